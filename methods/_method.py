"""What every method states about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from methods._pattern import Pattern

    # weight (out, in) float32, statistics by name, pattern, options, seeded generator
    PruneFunction = Callable[[torch.Tensor, Mapping[str, torch.Tensor], Pattern, Any, torch.Generator], "Pruned"]


@dataclass(frozen=True)
class Pruned:
    """What a method returns: `weight` and `keep`, both (out, in), and what a reader of the report should know."""

    weight: torch.Tensor
    keep: torch.Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


@dataclass(frozen=True)
class Method:
    """One weight-sparsity method: `prune` sees one linear map at a time, and neither mutates nor reads anything else.

    `needs` names the statistics of the map's calibration inputs that `prune` reads; empty means that no text is needed.
    `options` is a frozen dataclass whose fields carry `metadata={"help": ...}`.
    """

    summary: str
    paper: str
    cost: str
    needs: tuple[str, ...]
    prune: PruneFunction
    options: type = NoOptions
