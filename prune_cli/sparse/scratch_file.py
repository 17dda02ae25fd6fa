"""What is made while a file is looked at and put into its place later: on the disk, so that memory stays small."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from types import TracebackType

_PIECE = 1 << 22


class Spool:
    """Bytes by name in a file of no name in `folder`, for several threads."""

    def __init__(self, folder: Path) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._one = Lock()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str, data: bytes) -> None:
        with self._one:
            begin, self._end = self._end, self._end + len(data)
        self._places[name] = (begin, len(data))
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, begin)
            view, begin = view[written:], begin + written

    def pieces(self, name: str) -> Iterator[tuple[int, bytes]]:
        """(position in what was added, bytes)."""
        begin, size = self._places[name]
        position = 0
        while position < size:
            piece = os.pread(self._file.fileno(), min(_PIECE, size - position), begin + position)
            yield position, piece
            position += len(piece)
