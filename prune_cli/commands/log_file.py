"""`--log-file`: what a run tells, with times, in a file beside the terminal."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console

from prune_cli import progress
from prune_cli.errors import RequestError
from prune_cli.progress import Progress, Silent
from prune_cli.ranks.environment import is_first
from prune_cli.time_left import ExpectedStage
from prune_cli.version import __version__


class Logged(Silent):
    """What `shown` shows, and how the run ended, also in a file: a line with the time for each stage and message."""

    def __init__(self, shown: Progress, file: Path) -> None:
        self._shown, self._path = shown, file
        try:
            self._file = file.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise RequestError(f"--log-file {file} cannot be written ({error.strerror}): choose another.") from error

    def expect(self, stages: Sequence[ExpectedStage]) -> None:
        self._shown.expect(stages)

    def stage(self, title: str, steps: int) -> None:
        self._write(title)
        self._shown.stage(title, steps)

    def advance(self, steps: int = 1) -> None:
        self._shown.advance(steps)

    def say(self, text: str) -> None:
        self._write(text)
        self._shown.say(text)

    def __enter__(self) -> Logged:
        self._write(f"prune-cli {__version__}: {shlex.join(sys.argv[1:])}")
        self._shown.__enter__()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._write("Done" if value is None else f"{type(value).__name__}: {value}")
        self._file.close()
        self._shown.__exit__(kind, value, trace)

    def _write(self, text: str) -> None:
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def progress_on(console: Console, *, quiet: bool, log_file: Path | None) -> Progress:
    """What a command shows on `console`, nothing in later ranks. Raises RequestError for a file not to be written."""
    if not is_first():
        return Silent()
    shown = progress.progress_on(console, quiet=quiet)
    return shown if log_file is None else Logged(shown, log_file)
