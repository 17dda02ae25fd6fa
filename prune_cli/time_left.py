"""How long the rest of a run takes: what its stages are expected to cost, at the pace that was seen so far."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpectedStage:
    """A stage by how its title begins, with about how many seconds of `work`. Stages of one `kind` go at one pace."""

    title: str
    kind: str
    work: float


class TimeLeft:
    """Told of every stage and step of a run; a stage that was not expected costs nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ahead: list[ExpectedStage] = []
        self._now: ExpectedStage | None = None
        self._steps = self._done = 0
        self._begun = clock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._work: defaultdict[str, float] = defaultdict(float)

    @property
    def knows_all(self) -> bool:
        """Whether what is left is that of the whole run, not of the stage alone."""
        return self._now is not None

    def expect(self, stages: Sequence[ExpectedStage]) -> None:
        """What is to come, in its order; the stages may leave some out."""
        self._ahead = list(stages)

    def stage(self, title: str, steps: int) -> None:
        if self._now is not None:
            self._seconds[self._now.kind] += self._clock() - self._begun
            self._work[self._now.kind] += self._now.work
        self._now = None
        at = next((at for at, each in enumerate(self._ahead) if title.startswith(each.title)), None)
        if at is not None:
            self._now, self._ahead = self._ahead[at], self._ahead[at + 1 :]
        self._steps, self._done, self._begun = steps, 0, self._clock()

    def advance(self, steps: int = 1) -> None:
        self._done += steps

    def seconds(self) -> float | None:
        """Of the whole run where its stages were told before, else of the stage; None while nothing can be said."""
        spent, share = self._clock() - self._begun, min(self._done / self._steps, 1.0) if self._steps else 0.0
        if self._now is None:
            return spent / share * (1 - share) if share else None
        paces = self._paces(spent, share)
        usual = self._pace(sum(self._seconds.values()) + spent, sum(self._work.values()) + share * self._now.work)
        if usual is None:
            return None
        pace = paces.get(self._now.kind, usual)
        here = spent / share * (1 - share) if share else max(self._now.work * pace - spent, 0.0)
        return here + sum(each.work * paces.get(each.kind, usual) for each in self._ahead)

    def _paces(self, spent: float, share: float) -> dict[str, float]:
        """Seconds that expected ones take, for every kind of stage seen so far."""
        assert self._now is not None
        seconds, work = dict(self._seconds), dict(self._work)
        if share:
            seconds[self._now.kind] = seconds.get(self._now.kind, 0.0) + spent
            work[self._now.kind] = work.get(self._now.kind, 0.0) + share * self._now.work
        found = {kind: self._pace(seconds[kind], work[kind]) for kind in seconds}
        return {kind: pace for kind, pace in found.items() if pace is not None}

    def _pace(self, seconds: float, work: float) -> float | None:
        return seconds / work if work > 0 else None
