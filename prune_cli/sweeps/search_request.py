"""What `prune-cli sweep --search` was asked for, checked before any work. No torch here."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from prune_cli.errors import RequestError
from prune_cli.sweeps.request import Point, SweepRequest

Strategy = Literal["random", "evolution"]
DEFAULT_BUDGET, DEFAULT_HELD_OUT = 32, 16
_MOST = 10**6


@dataclass(frozen=True)
class SearchRequest:
    """One method at one sparsity of `sweep`; `budget` candidates are judged on `held_out` calibration windows."""

    sweep: SweepRequest
    strategy: Strategy
    budget: int = DEFAULT_BUDGET
    held_out: int = DEFAULT_HELD_OUT

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the model."""
        if self.strategy not in typing.get_args(Strategy):
            raise RequestError(f"--search is {self.strategy!r}: choose random or evolution.")
        for option, value, least in (("--budget", self.budget, 2), ("--held-out", self.held_out, 1)):
            if not least <= value <= _MOST:
                raise RequestError(f"{option} is {value}, but must be at least {least} and at most {_MOST}.")
        self.sweep.check()
        sparsities = self.sweep.sparsities
        if len(self.sweep.methods) != 1 or len(sparsities) != 1 or sparsities[0] == 0 or self.sweep.pattern is not None:
            raise RequestError(
                "--search spreads one sparsity for one method: give one --method and one --sparsity above 0, as "
                "-m wanda -s 0.6, and no --pattern."
            )

    def point(self) -> Point:
        """The method and sparsity without an allocation, which is the uniform one."""
        return self.sweep.points()[0]
