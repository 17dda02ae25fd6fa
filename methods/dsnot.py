"""DSnoT: another method's mask, then prune-and-grow without training (Zhang et al., arXiv:2310.08915)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from methods import magnitude, sparsegpt, wanda
from methods._dsnot_released import exchange
from methods._method import Method, Pruned
from methods._pattern import Pattern, zeroed
from methods._torch import torch
from methods.steps import dsnot

_STARTS = {"wanda": wanda.METHOD, "magnitude": magnitude.METHOD, "sparsegpt": sparsegpt.METHOD}


@dataclass(frozen=True)
class Options(dsnot.Options):
    start: Literal["wanda", "magnitude", "sparsegpt"] = field(
        default="wanda", metadata={"help": "the method whose mask is the start; kept weights stay dense"}
    )
    released: bool = field(
        default=False,
        metadata={
            "help": "do as the authors' released code does: sums per sample, an unscaled threshold, walks past the end "
            "of its lists (stop=sign is its other stop; --calibrate-by block its protocol)"
        },
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
    if not options.released:
        return dsnot.improve(weight, begun, statistics, pattern, options)
    keep = exchange(
        weight,
        begun.keep,
        statistics,
        pattern,
        max_cycles=options.max_cycles,
        threshold=options.threshold,
        power=options.power,
        stop_on_sign=options.stop == "sign",
    )
    return Pruned(zeroed(weight, keep), keep, begun.notes)


def _options_of(start: str) -> object:
    # Rows are refined one by one, so every row starts with the same count, as in the authors' code.
    return magnitude.Options(per="row") if start == "magnitude" else _STARTS[start].options()


def _needs_of_options(options: Options) -> tuple[str, ...]:
    released = ("sample_sum", "within_variance") if options.released else ()
    return (*_STARTS[options.start].needs, *released)


METHOD = Method(
    summary="starts from the mask of wanda (or another) and exchanges weights until each row's expected error is gone",
    paper="Zhang et al., Dynamic Sparse No Training, arXiv:2310.08915",
    cost="one forward pass, a few selections a layer",
    needs=dsnot.STEP.needs,
    prune=prune,
    options=Options,
    more_needs=_needs_of_options,
)
