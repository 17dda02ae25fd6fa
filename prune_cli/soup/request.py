"""What `prune-cli soup` was asked for, frozen and checked before any work. No torch here."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prune_cli.errors import RequestError

Masks = Literal["same", "union", "intersection"]
_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class SoupRequest:
    """What `prune-cli soup` was asked for. `weights` None stands for equal shares."""

    models: tuple[str, ...]
    out: Path
    weights: tuple[float, ...] | None = None
    masks: Masks = "same"
    allow_changed_inputs: bool = False
    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """Raise RequestError for anything that can be told wrong without the models."""
        if len(self.models) < 2:
            raise RequestError("A soup needs at least two models before OUT: prune-cli soup A B OUT.")
        if self.masks not in typing.get_args(Masks):
            raise RequestError(f"--masks is {self.masks!r}: choose one of {', '.join(typing.get_args(Masks))}.")
        if self.weights is None:
            return
        if len(self.weights) != len(self.models):
            raise RequestError(
                f"--weights has {len(self.weights)} numbers for {len(self.models)} models: one for each."
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise RequestError("--weights must be above 0, each: leave out a model that shall not count.")
        if abs(math.fsum(self.weights) - 1) > _SUM_TOLERANCE:
            raise RequestError(f"--weights add up to {math.fsum(self.weights):g}, but must add up to 1.")

    def shares(self) -> tuple[float, ...]:
        return self.weights or (1 / len(self.models),) * len(self.models)
