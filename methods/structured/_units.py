"""The hidden units of one part of a block: channels of an MLP, or attention heads by whole key-value groups."""

from __future__ import annotations

from dataclasses import dataclass

from methods._torch import torch


@dataclass(frozen=True)
class Units:
    """What carries `count` units, in float32.

    `consumer` (out, count * width) reads them, `width` inputs a unit one after the other; `producers` are what makes
    them, each (count, rows of a unit, hidden).
    """

    consumer: torch.Tensor
    producers: tuple[torch.Tensor, ...]
    width: int = 1

    @property
    def count(self) -> int:
        return self.consumer.shape[1] // self.width

    def of_inputs(self, values: torch.Tensor) -> torch.Tensor:
        """Sum what is known by input, (in,), by unit: (count,)."""
        return values[: self.count * self.width].view(self.count, self.width).sum(1)


def inputs_of(units: torch.Tensor, width: int) -> torch.Tensor:
    """The inputs of the consumer (len(units) * width,) that belong to `units`, in their order."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` units with the highest scores, in order; of equals the first ones. (count,) of indices."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values
