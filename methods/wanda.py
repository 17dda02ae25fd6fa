"""Wanda: weight times input norm, compared within a row (Sun et al., arXiv:2306.11695, equation 1)."""

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
    """Keep the weights (out, in) with the highest |W_ij| * ||X_j||_2; `statistics["sq_norm"]` is (in,)."""
    keep = keep_highest(weight.abs().mul_(statistics["sq_norm"].sqrt()), pattern)
    return Pruned(zeroed(weight, keep), keep)


METHOD = Method(
    summary="keeps the weights whose product with the norm of their input is largest, row by row",
    paper="Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv:2306.11695",
    cost="one forward pass over the calibration tokens",
    needs=("sq_norm",),
    prune=prune,
)
