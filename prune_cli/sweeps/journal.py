"""The output folder of a sweep while it is made: a line per measured point, so that a killed sweep goes on.

Everything lies in `OUT.partial` until one rename makes it OUT; the journal, `points.jsonl`, stays there with the loss
of every window.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_cli.checkpoint.file_names import partial_folder
from prune_cli.checkpoint.journaled_folder import JournaledFolder, changed_keys, whole_lines
from prune_cli.errors import RequestError
from prune_cli.sweeps.point_run import Measured
from prune_cli.sweeps.request import Point

POINTS = "points.jsonl"


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an OUT that cannot be made, before any work."""
    partial = partial_folder(out)
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and _ours(out)):
        raise RequestError(f"{out} exists already and is no sweep: choose another OUTDIR.")
    if os.path.lexists(out) and not (resume or overwrite):
        raise RequestError(
            f"{out} exists already: choose another OUTDIR, add --resume to measure what it lacks, or --overwrite."
        )
    if partial.exists() and not _ours(partial):
        raise RequestError(
            f"{partial} exists and is no sweep: finish what is being made there, or choose another OUTDIR."
        )
    if partial.exists() and not (resume or overwrite):
        raise RequestError(
            f"{partial} holds an interrupted sweep: add --resume to continue it, or --overwrite to start again."
        )
    existing = next(parent for parent in out.expanduser().resolve().parents if parent.exists())
    if not os.access(existing, os.W_OK):
        raise RequestError(f"{existing} cannot be written to: choose another OUTDIR.")


def _ours(out: Path) -> bool:
    names = {path.name for path in out.iterdir()}
    return not names or POINTS in names


class Journal:
    """A context; once it is entered, `find` and `notes` have what an earlier run measured."""

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        self._folder = JournaledFolder(out, POINTS, maker="sweep", word="OUTDIR")
        self.folder = self._folder.partial
        self._out = out
        self._fingerprint = fingerprint
        self._resume = resume
        self._done: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}

    def __enter__(self) -> Journal:
        """Raises RequestError for another sweep at work there, and on resuming one that was asked for other things."""
        lines = self._earlier() if self._resume else []
        if lines:
            self._continue(lines)
        self._folder.lock()
        if not (lines and self._folder.continue_lines()):
            self._folder.restart(lines or [{"fingerprint": self._fingerprint}])
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()

    def _earlier(self) -> list[dict[str, Any]]:
        """What an interrupted sweep has measured, or one that is finished and gets more points."""
        return whole_lines(self._folder.journal) or whole_lines(self._out / POINTS)

    def _continue(self, lines: Sequence[Mapping[str, Any]]) -> None:
        changed = changed_keys(lines[0].get("fingerprint", {}), self._fingerprint)
        if changed:
            raise RequestError(
                f"The sweep in {self._out} was asked for something else ({', '.join(changed)} differ): repeat its "
                "command with --resume (methods and sparsities may be added), or add --overwrite to start again."
            )
        for line in lines[1:]:
            if "point" in line:
                self._done[json.dumps(line["point"], sort_keys=True)] = dict(line)
            else:
                self.notes.update(line)

    def find(self, point: Point) -> Measured | None:
        """What an earlier run measured of `point`."""
        line = self._done.get(point.key)
        return None if line is None else Measured(point, tuple(line["losses"]), line["sparsity"], line["seconds"])

    def add(self, measured: Measured) -> None:
        line = {
            "point": json.loads(measured.point.key),
            "losses": measured.losses,
            "sparsity": measured.sparsity,
            "seconds": measured.seconds,
        }
        self._folder.append(line)

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON `value` that is found in `notes` when the sweep is resumed."""
        self._folder.append({key: value})

    def commit(self, files: Mapping[str, str | bytes]) -> None:
        """Write `files` beside the journal, and make the folder OUT in one rename."""
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (self.folder / name).write_bytes(data)
        self._folder.commit(keep_journal=True)
