"""Random: the baseline that any score must beat (Liu et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Mapping

from methods._method import Method, NoOptions, Pruned
from methods._pattern import Pattern, keep_highest, zeroed
from methods._torch import torch


def prune(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    options: NoOptions,
    generator: torch.Generator,
) -> Pruned:
    """Keep weights (out, in) drawn uniformly within each row by `generator` (a CPU generator, so devices agree)."""
    score = torch.rand(weight.shape, generator=generator).to(weight.device)
    keep = keep_highest(score, pattern)
    return Pruned(zeroed(weight, keep), keep)


METHOD = Method(
    summary="keeps weights drawn at random, row by row: the baseline; needs no text",
    paper="Liu et al., The Unreasonable Effectiveness of Random Pruning, arXiv:2202.02643",
    cost="one read of the checkpoint, no forward pass",
    needs=(),
    prune=prune,
)
