"""What every method states about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from methods._pattern import Pattern

    # weight (out, in) float32, statistics by name, pattern, options, seeded generator
    PruneFunction = Callable[[torch.Tensor, Mapping[str, torch.Tensor], Pattern, Any, torch.Generator], "Pruned"]
    # dense weight (out, in) float32, what the method made of it, statistics by name, pattern, options
    ImproveFunction = Callable[[torch.Tensor, "Pruned", Mapping[str, torch.Tensor], Pattern, Any], "Pruned"]


@dataclass(frozen=True)
class Pruned:
    """What a method returns: `weight` and `keep`, both (out, in), and what a reader of the report should know."""

    weight: torch.Tensor
    keep: torch.Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


def no_more(options: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Method:
    """One weight-sparsity method: `prune` sees one linear layer at a time, and neither mutates nor reads anything else.

    `needs` names the statistics of the layer's calibration inputs that `prune` reads; with none, no text is needed.
    `options` is a frozen dataclass whose fields carry `metadata={"help": ...}`, numbers also `least` and `most` where
    there are such; `more_needs` tells what they add.
    `solves` is true where kept weights get new values, `counts_rows` where each row loses as many as the others; else
    the count holds for the tensor or for blocks of columns.
    """

    summary: str
    paper: str
    cost: str
    needs: tuple[str, ...]
    prune: PruneFunction
    options: type = NoOptions
    more_needs: Callable[[Any], tuple[str, ...]] = no_more
    solves: bool = False
    counts_rows: bool = True

    def needs_with(self, options: Any) -> tuple[str, ...]:
        """All statistics that `prune` reads with these options."""
        return tuple(dict.fromkeys((*self.needs, *self.more_needs(options))))


@dataclass(frozen=True)
class Step:
    """What may follow any method: `improve` changes its mask at the same sparsity, or the weights that it kept.

    A step that changes the mask gives kept weights their dense values. The other fields are those of `Method`.
    """

    changes: Literal["mask", "weights"]
    summary: str
    paper: str
    cost: str
    needs: tuple[str, ...]
    improve: ImproveFunction
    options: type = NoOptions
