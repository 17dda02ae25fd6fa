"""Depth: whole decoder blocks go, chosen by what the hidden states or the loss say about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from methods._torch import torch
from methods.structured._method import StructuredMethod

# How many blocks greedy looks at more closely.
FEW = 3


@dataclass(frozen=True)
class Options:
    """`which` names the blocks itself, so that nothing is scored."""

    score: Literal["greedy", "influence", "angular"] = field(
        default="greedy",
        metadata={
            "help": "greedy: the block whose removal raises the calibration loss least (of the three best the one that "
            "does so after a refit), then the next; influence: "
            "those that turn the hidden states least (ShortGPT); angular: the run of blocks with the closest ends"
        },
    )
    remove: int | None = field(
        default=None, metadata={"help": "how many blocks to remove, in place of --sparsity", "least": 1}
    )
    which: str | None = field(
        default=None, metadata={"help": "the blocks to remove, counted from 0, as 20-27 or 3,5,7-9"}
    )
    windows: int = field(default=16, metadata={"help": "calibration windows that greedy takes losses on", "least": 1})
    refit: Literal["all", "none"] = field(
        default="all",
        metadata={
            "help": "what makes up for the blocks: the layers of the blocks behind the first that goes are fitted by "
            "least squares to the dense model"
        },
    )
    alpha: float = field(
        default=0.75, metadata={"help": "how far the fits follow the dense model", "least": 0, "most": 1}
    )
    damping: float = field(
        default=0.1, metadata={"help": "pull towards the dense weights, as a share of each input's square", "least": 0}
    )

    @property
    def fits(self) -> bool:
        """Whether linear layers are fitted."""
        return self.refit == "all"


def block_count(sparsity: float, blocks: int) -> int:
    """How many of `blocks` a share stands for: rounded, at least one, and never all."""
    return max(1, min(blocks - 1, int(sparsity * blocks + 0.5)))


def cosines(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Between the hidden states of the same tokens, (..., hidden) each; (tokens,) in `dtype`."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return torch.nn.functional.cosine_similarity(a.to(dtype), b.to(dtype), dim=-1).clamp(-1, 1)


def angular_distances(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """arccos(cos) / pi for every token, in [0, 1]."""
    return torch.arccos(cosines(a, b, dtype)) / torch.pi


def lowest_influence(influence: torch.Tensor, count: int) -> list[int]:
    """The `count` blocks of lowest 1 - mean cos(input, output), (blocks,); of equal ones the earlier."""
    return sorted(torch.argsort(influence, stable=True)[:count].tolist())


def closest_run(distances: torch.Tensor, count: int) -> list[int]:
    """The `count` blocks in a row whose ends lie closest: `distances[i, j]`, of the states before blocks i and j."""
    ends = torch.diagonal(distances, count)
    first = int(torch.argmin(ends))
    return list(range(first, first + count))


def cheapest(losses: Mapping[int, float]) -> int:
    """The block whose removal leaves the lowest loss; of equal ones the earlier."""
    return min(losses, key=lambda block: (losses[block], block))


def cheapest_few(losses: Mapping[int, float]) -> list[int]:
    """The few blocks whose removal leaves the lowest loss, for a closer look."""
    return sorted(losses, key=lambda block: (losses[block], block))[:FEW]


def _needs_text(options: Options) -> bool:
    return options.which is None or options.fits


METHOD = StructuredMethod(
    summary="removes whole decoder blocks: a smaller model that is faster everywhere, in proportion",
    paper="Men et al., ShortGPT, arXiv:2403.03853 (influence); Gromov et al., The Unreasonable Ineffectiveness of the "
    "Deeper Layers, arXiv:2403.17887 (angular)",
    cost="influence and angular: one forward pass of the calibration text. greedy: per removed block as much computing "
    "as about blocks/2 passes of its windows (-o windows=16), with one read of the weights or a few, and with a refit "
    "three passes of two streams of four times the windows. refit: one pass "
    "of two streams of hidden states, and Gram matrices of the inputs of the layers that are fitted",
    needs=("hidden states between the blocks, or the loss without each",),
    unit="blocks",
    options=Options,
    needs_text=_needs_text,
)
