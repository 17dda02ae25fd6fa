"""DSnoT: another method's mask, then prune-and-grow without training (Zhang et al., arXiv:2310.08915)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from methods import magnitude, sparsegpt, wanda
from methods._method import Method, Pruned
from methods._pattern import Pattern
from methods.steps import dsnot

_STARTS = {"wanda": wanda.METHOD, "magnitude": magnitude.METHOD, "sparsegpt": sparsegpt.METHOD}


@dataclass(frozen=True)
class Options(dsnot.Options):
    start: Literal["wanda", "magnitude", "sparsegpt"] = field(
        default="wanda", metadata={"help": "the method whose mask is the start; kept weights stay dense"}
    )


def prune(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    options: Options,
    generator: torch.Generator,
) -> Pruned:
    """The mask of `options.start` within each row, then the step `dsnot` on (out, in)."""
    start = _STARTS[options.start]
    begun = start.prune(weight, statistics, pattern, _options_of(options.start), generator)
    return dsnot.improve(weight, begun, statistics, pattern, options)


def _options_of(start: str) -> object:
    # Rows are refined one by one, so every row starts with the same count, as in the authors' code.
    return magnitude.Options(per="row") if start == "magnitude" else _STARTS[start].options()


def _needs_of_start(options: Options) -> tuple[str, ...]:
    return _STARTS[options.start].needs


METHOD = Method(
    summary="starts from the mask of wanda (or another) and exchanges weights until each row's expected error is gone",
    paper="Zhang et al., Dynamic Sparse No Training, arXiv:2310.08915",
    cost="one forward pass, a few selections a map",
    needs=dsnot.STEP.needs,
    prune=prune,
    options=Options,
    more_needs=_needs_of_start,
)
