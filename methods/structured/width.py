"""Width: channels of the MLPs and attention heads go, and the linear layers that read them are fitted anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from methods._gram import dense_target, raised_damping
from methods._torch import torch
from methods.structured._method import StructuredMethod
from methods.structured._obs import eliminate
from methods.structured._refit import bias_of_removed, least_squares
from methods.structured._scores import NEEDS, SCORES
from methods.structured._units import Units, highest, inputs_of

# Optimal Brain Surgeon removes this share of the units at a time, then looks again.
_STEPS = 64
_LARGEST_MULTIPLE, _LEAST_OF_THEM = 128, 16


@dataclass(frozen=True)
class Options:
    parts: Literal["mlp", "heads", "both"] = field(
        default="mlp", metadata={"help": "what becomes narrower: MLP channels, heads (whole key-value groups), or both"}
    )
    score: Literal["obs", "cfsp", "flap", "wanda", "magnitude"] = field(
        default="obs",
        metadata={"help": "which units go; obs: those that the others make up for best, a few at a time"},
    )
    refit: Literal["all", "consumers", "bias", "none"] = field(
        default="all",
        metadata={
            "help": "what makes up for them: all layers of the block are fitted by least squares, or those that read "
            "the units (consumers), or their bias takes the mean of what is lost (bias, where there is one)"
        },
    )
    multiple: int | None = field(
        default=None,
        metadata={
            "help": "channels are a multiple of this [default: the largest of 128, 64, 32, ... of which there are 16]",
            "least": 1,
        },
    )
    uniform: bool = field(
        default=True,
        metadata={
            "help": "the same size in every block, which loads everywhere; false: blocks that turn the hidden states "
            "further keep more (CFSP), which loads only where prune_cli is imported"
        },
    )
    alpha: float = field(
        default=0.75,
        metadata={
            "help": "how far the fits follow the dense model; 0: only the pruned one, which takes half as long",
            "least": 0,
            "most": 1,
        },
    )
    damping: float = field(
        default=0.01, metadata={"help": "pull towards the dense weights, as a share of each input's square", "least": 0}
    )
    obs_damping: float = field(
        default=0.01,
        metadata={"help": "of the Gram matrix that obs inverts, as a share of its mean diagonal", "least": 0},
    )

    @property
    def fits(self) -> bool:
        """Whether anything is fitted by least squares."""
        return self.refit in ("all", "consumers")

    @property
    def follows_dense(self) -> bool:
        return self.alpha > 0 and (self.fits or self.score == "obs")


def statistics_for(options: Options) -> tuple[str, ...]:
    """What must be known of the inputs of a linear layer that reads units."""
    gram = ("gram",) if options.score == "obs" or options.fits else ()
    return (*gram, *NEEDS.get(options.score, ()), *(("mean",) if options.refit == "bias" else ()))


def default_multiple(units: int) -> int:
    """The largest of 128, 64, 32, ... that divides `units` into at least 16."""
    multiple = _LARGEST_MULTIPLE
    while multiple > 1 and (units % multiple or units // multiple < _LEAST_OF_THEM):
        multiple //= 2
    return multiple


def kept_units(units: int, sparsity: float, multiple: int) -> int:
    """How many of `units` stay: (1 - sparsity) of them, rounded to a multiple, at least one and never more."""
    return min(units, max(multiple, int((1 - sparsity) * units / multiple + 0.5) * multiple))


@dataclass(frozen=True)
class Narrowed:
    """`kept` (keep,) of the units in order, `weight` (out, keep * width), `bias` (out,) where the layer has one."""

    kept: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    notes: tuple[str, ...] = ()


def narrow(
    units: Units,
    bias: torch.Tensor | None,
    statistics: Mapping[str, torch.Tensor],
    keep: int,
    options: Options,
) -> Narrowed:
    """Choose the `keep` units that stay and the values of the linear layer that reads them.

    Where there is a `bias`, Gram and cross statistics have one more input at the end that is always 1.
    Raises ValueError where the inputs' Gram matrix stays singular.
    """
    weight = units.consumer if bias is None else torch.cat([units.consumer, bias[:, None]], 1)
    target = dense_target(weight, statistics, options.alpha) if "gram" in statistics else weight
    if options.score == "obs":
        chunk = max(1, units.count // _STEPS)
        kept = eliminate(statistics["gram"], target, units.width, units.count, keep, options.obs_damping, chunk)
    else:
        kept = highest(SCORES[options.score](units, statistics), keep)
    columns = inputs_of(kept, units.width)
    if options.fits:
        constant = torch.arange(units.consumer.shape[1], weight.shape[1], device=columns.device)
        new, used = fitted(weight, statistics["gram"], target, torch.cat([columns, constant]), options)
        own, rest = new[:, : len(columns)], new[:, len(columns) :]
        return Narrowed(kept, own, None if bias is None else rest[:, 0], used)
    own = units.consumer[:, columns]
    if bias is not None and options.refit == "bias":
        bias = bias + bias_of_removed(units.consumer, statistics["mean"], columns)
    return Narrowed(kept, own, bias)


def fitted(
    weight: torch.Tensor, gram: torch.Tensor, target: torch.Tensor, columns: torch.Tensor, options: Options
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The least squares for `columns` of a linear layer (out, in), and what the report should know of it."""
    new, used = least_squares(weight, gram, target, columns, options.damping)
    return new, raised_damping(options.damping, used)


def _needs_text(options: Options) -> bool:
    return bool(statistics_for(options)) or not options.uniform


METHOD = StructuredMethod(
    summary="removes MLP channels and attention heads: a smaller dense model with the same number of blocks",
    paper="Wang et al., CFSP, arXiv:2409.13199; An et al., FLAP, arXiv:2312.11983; obs: Hassibi & Stork, Second Order "
    "Derivatives for Network Pruning, NIPS 1992, for whole units",
    cost="one forward pass, a second stream of dense hidden states unless alpha=0, and Gram matrices of the inputs of "
    "the layers that are fitted; obs: as inverting the Gram matrix of the MLP's width",
    needs=("inputs of the linear layers",),
    unit="channels or heads",
    options=Options,
    needs_text=_needs_text,
)
