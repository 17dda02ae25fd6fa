"""The output folder of a sweep while it is made: a line per measured point, so that a killed sweep goes on.

Everything lies in `OUT.partial` until one rename makes it OUT; the journal, `points.jsonl`, stays there with the loss
of every window.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from prune_cli.checkpoint.file_names import partial_folder
from prune_cli.errors import RequestError
from prune_cli.sweep.point_run import Measured
from prune_cli.sweep.request import Point

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


def _whole(path: Path) -> str:
    """All whole lines; one cut short by a kill is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _whole(path).splitlines()]


class Journal:
    """A context; once it is entered, `find` and `notes` have what an earlier run measured."""

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = partial_folder(out)
        self._out = out
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._resume = resume
        self._file: IO[str] | None = None
        self._done: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}

    def __enter__(self) -> Journal:
        """Raises RequestError for another sweep at work there, and on resuming one that was asked for other things."""
        path = self.folder / POINTS
        lines = _lines(path) or _lines(self._out / POINTS) if self._resume else []
        if lines:
            self._continue(lines)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RequestError(
                f"Another sweep is writing to {self.folder}: wait for it, or choose another OUTDIR."
            ) from None
        self._file.truncate(len(_whole(path).encode()) if lines else 0)
        if path.stat().st_size == 0:
            for other in self.folder.iterdir():
                if other != path:
                    other.unlink()
            for line in lines or [{"fingerprint": self._fingerprint}]:
                self._append(line)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _continue(self, lines: Sequence[Mapping[str, Any]]) -> None:
        before = lines[0].get("fingerprint", {})
        changed = sorted(
            key for key in before.keys() | self._fingerprint.keys() if before.get(key) != self._fingerprint.get(key)
        )
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
        self._append(line)

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON `value` that is found in `notes` when the sweep is resumed."""
        self._append({key: value})

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def commit(self, files: Mapping[str, str | bytes]) -> None:
        """Write `files` beside the journal, and make the folder OUT in one rename."""
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (self.folder / name).write_bytes(data)
        replaced = self._out.with_name(self._out.name + ".replaced")
        if self._out.exists():
            self._out.rename(replaced)
        self.folder.rename(self._out)
        shutil.rmtree(replaced, ignore_errors=True)
