"""What a person sees while the run works: a bar on a terminal, plain lines elsewhere, nothing when quiet. On stderr."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from prune_cli.time_left import ExpectedStage, TimeLeft

_SECONDS_BETWEEN_LINES = 10.0
# Seconds from which a time is told in minutes.
_LONG = 120
# Leaves room on a line of 80 for the title, the steps and the time left.
_BAR_WIDTH = 16


class Progress(Protocol):
    """A run goes through stages; each has a number of steps. `expect` tells before which stages there will be."""

    def expect(self, stages: Sequence[ExpectedStage]) -> None: ...
    def stage(self, title: str, steps: int) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def say(self, text: str) -> None: ...
    def __enter__(self) -> Progress: ...
    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None: ...


class Silent:
    """For --quiet, and scripts that call the Python API."""

    def expect(self, stages: Sequence[ExpectedStage]) -> None:
        pass

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


def left(time_left: TimeLeft) -> str:
    """'about 20 s left' of a stage, 'about 20 s left in all' of a run; empty while nothing is known."""
    seconds = time_left.seconds()
    if seconds is None:
        return ""
    told = f"{seconds:.0f} s" if seconds < _LONG else f"{seconds / 60:.0f} min"
    return f"about {told} left{' in all' if time_left.knows_all else ''}"


class Lines(Silent):
    """One line when a stage begins, then one every few seconds: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title, self._steps, self._done, self._last = "", 0, 0, 0.0
        self._left = TimeLeft()

    def expect(self, stages: Sequence[ExpectedStage]) -> None:
        self._left.expect(stages)

    def stage(self, title: str, steps: int) -> None:
        self._title, self._steps, self._done = title, steps, 0
        self._left.stage(title, steps)
        self._last = time.monotonic()
        self.say(title)

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        self._left.advance(steps)
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES and self._done < self._steps:
            self._last = now
            self.say(f"{self._title}: {self._done}/{self._steps}, {left(self._left)}")

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


class _Left(ProgressColumn):
    max_refresh = 0.5

    def __init__(self, time_left: TimeLeft) -> None:
        super().__init__()
        self._left = time_left

    def render(self, task: Task) -> Text:
        return Text(left(self._left), style="progress.remaining")


class Bar(Silent):
    """A live bar with the time left."""

    def __init__(self, console: Console) -> None:
        self._left = TimeLeft()
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _Left(self._left),
            console=console,
        )
        self._task = self._bar.add_task("", visible=False)

    def expect(self, stages: Sequence[ExpectedStage]) -> None:
        self._left.expect(stages)

    def stage(self, title: str, steps: int) -> None:
        self._left.stage(title, steps)
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(title, total=steps)

    def advance(self, steps: int = 1) -> None:
        self._left.advance(steps)
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
    # In a notebook the bar is a widget.
    moves = importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    return Bar(console) if moves else Lines(console)


def progress_from_python(asked: bool | None) -> Progress:
    """As `asked`; None is yes in a notebook, and no elsewhere."""
    console = Console(stderr=True)
    return progress_on(console, quiet=not (console.is_jupyter if asked is None else asked))
