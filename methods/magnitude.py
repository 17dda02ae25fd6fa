"""Magnitude: the smallest weights go (for the one-shot use: Jaiswal et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from methods._method import Method, Pruned
from methods._pattern import Pattern, Unstructured, keep_highest, zeroed
from methods._torch import torch


@dataclass(frozen=True)
class Options:
    per: Literal["tensor", "row"] = field(
        default="tensor",
        metadata={"help": "weights compete within the whole tensor (as in the papers) or within a row"},
    )


def prune(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    options: Options,
    generator: torch.Generator,
) -> Pruned:
    """Keep the weights (out, in) with the highest |W_ij|; reads no statistics."""
    if isinstance(pattern, Unstructured):
        pattern = replace(pattern, per=options.per)
    keep = keep_highest(weight.abs(), pattern)
    return Pruned(zeroed(weight, keep), keep)


METHOD = Method(
    summary="keeps the largest weights of each tensor; needs no text",
    paper="Jaiswal et al., The Emergence of Essential Sparsity in Large Pre-trained Models, arXiv:2306.03805",
    cost="one read of the checkpoint, no forward pass",
    needs=(),
    prune=prune,
    options=Options,
    counts_rows=False,
)
