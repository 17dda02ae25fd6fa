"""RIA: relative importance times input activity (Zhang et al., Plug-and-Play, ICLR 2024, equations 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from methods._method import Method, Pruned
from methods._pattern import Pattern, keep_highest, zeroed
from methods._torch import torch


@dataclass(frozen=True)
class Options:
    power: float = field(default=0.5, metadata={"help": "exponent of the input norm, a in the paper", "least": 0})


def prune(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    options: Options,
    generator: torch.Generator,
) -> Pruned:
    """Keep the highest (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||^a of each row; `sq_norm` is (in,)."""
    size = weight.abs()
    # A row or column of zeros has nothing to rank; the tiny floor keeps 0/0 out.
    of_column = size / size.sum(0, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    of_row = size / size.sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    keep = keep_highest((of_column + of_row) * statistics["sq_norm"].pow(options.power / 2), pattern)
    return Pruned(zeroed(weight, keep), keep)


METHOD = Method(
    summary="like wanda, with each weight relative to the weights of its row and of its column",
    paper="Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for LLMs, openreview Tr0lPx9woF",
    cost="one forward pass over the calibration tokens",
    needs=("sq_norm",),
    prune=prune,
    options=Options,
)
