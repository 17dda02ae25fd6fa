"""An output folder while it is made: `OUT.partial` with a journal, which a killed run finds again; a rename ends it.

What a run has done is on the disk before its line in the journal is. One run at a time holds the journal's lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from prune_cli.checkpoint.file_names import OTHER_WEIGHTS, partial_folder
from prune_cli.checkpoint.reader import ADAPTER_CONFIG, INDEX_FILE
from prune_cli.errors import RequestError

_OTHER_INDICES = tuple(f"{suffix}.index.json" for suffix in OTHER_WEIGHTS)


class JournaledFolder:
    """`journal` is the file's name; `maker` ("run") and `word` ("OUT") are what the user calls run and folder."""

    def __init__(self, out: Path, journal: str, *, maker: str = "run", word: str = "OUT") -> None:
        self.out = out
        self.partial = partial_folder(out)
        self.journal = self.partial / journal
        self._maker, self._word = maker, word
        self._file: IO[str] | None = None

    def lock(self) -> None:
        """Make the folder and hold it until `close`. Raises RequestError where another process holds it."""
        self.partial.mkdir(parents=True, exist_ok=True)
        self._file = self.journal.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RequestError(
                f"Another {self._maker} is writing to {self.partial}: wait for it, or choose another {self._word}."
            ) from None

    def continue_lines(self) -> list[dict[str, Any]]:
        """What was journaled; a line cut short by a kill is dropped, also from the file."""
        assert self._file is not None
        self._file.truncate(len(_whole(self.journal).encode()))
        return whole_lines(self.journal)

    def restart(self, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """Empty the folder and begin its journal with `lines`."""
        assert self._file is not None
        for path in self.partial.iterdir():
            if path != self.journal:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._file.truncate(0)
        for line in lines:
            self.append(line)

    def append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def copy_side_files(
        self, source: Path, skip: Collection[str], names: Mapping[str, str] | None = None
    ) -> tuple[str, ...]:
        """Copy tokenizer, templates and so on from `source`, but for what `skip` names; `names` renames some.

        Weights in other formats stay behind, and an adapter's config, which says that its weights are beside it:
        returns their names.
        """
        left = []
        for path in sorted(source.rglob("*")):
            relative = path.relative_to(source)
            hidden = any(part.startswith(".") for part in relative.parts)
            if not path.is_file() or hidden or str(relative) in skip:
                continue
            weights = str(relative) != INDEX_FILE and path.name.endswith((*OTHER_WEIGHTS, *_OTHER_INDICES))
            if weights or path.name == ADAPTER_CONFIG:
                left.append(str(relative))
                continue
            target = self.partial / (names or {}).get(str(relative), relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        return tuple(left)

    def commit(self, *, keep_journal: bool = False) -> None:
        """The folder becomes OUT in one rename; an OUT that is there goes once it has made room."""
        if not keep_journal:
            self.journal.unlink()
        if not self.out.exists():
            self.partial.rename(self.out)
            return
        replaced = self.out.with_name(self.out.name + ".replaced")
        self.out.rename(replaced)
        self.partial.rename(self.out)
        shutil.rmtree(replaced)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which entries of two fingerprints differ, as JSON has them."""
    before, now = (json.loads(json.dumps(each)) for each in (before, now))
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def whole_lines(journal: Path) -> list[dict[str, Any]]:
    """All lines of a journal, none if it is not there; one cut short by a kill is left out."""
    return [json.loads(line) for line in _whole(journal).splitlines()]


def _whole(journal: Path) -> str:
    text = journal.read_text(encoding="utf-8") if journal.exists() else ""
    return text[: text.rfind("\n") + 1]
