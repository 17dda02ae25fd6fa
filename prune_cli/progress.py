"""What a person sees while the run works: a bar on a terminal, plain lines elsewhere, nothing when quiet. On stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 10.0
# Seconds from which a time is told in minutes.
_LONG = 120


class Progress(Protocol):
    """A run goes through stages; each has a number of steps."""

    def stage(self, title: str, steps: int) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def say(self, text: str) -> None: ...
    def __enter__(self) -> Progress: ...
    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None: ...


class Silent:
    """For the Python API and --quiet."""

    def stage(self, title: str, steps: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        pass


class Lines(Silent):
    """One line when a stage begins, then one every few seconds: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title, self._steps, self._done, self._begun, self._last = "", 0, 0, 0.0, 0.0

    def stage(self, title: str, steps: int) -> None:
        self._title, self._steps, self._done = title, steps, 0
        self._begun = self._last = time.monotonic()
        self.say(title)

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES and self._done < self._steps:
            self._last = now
            left = (now - self._begun) / self._done * (self._steps - self._done)
            told = f"{left:.0f} s" if left < _LONG else f"{left / 60:.0f} min"
            self.say(f"{self._title}: {self._done}/{self._steps}, about {told} left")

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


class Bar(Silent):
    """A live bar with the time left."""

    def __init__(self, console: Console) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", visible=False)

    def stage(self, title: str, steps: int) -> None:
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(title, total=steps)

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._task, steps)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


def progress_on(console: Console, *, quiet: bool) -> Progress:
    if quiet:
        return Silent()
    return Bar(console) if console.is_terminal else Lines(console)
