"""What is cut out of a model together: one unit in every tensor that holds a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from prune_cli.model.tensor_info import TensorInfo

GroupName = Literal["mlp", "heads"]


WORDS: dict[GroupName, str] = {"mlp": "channels of the MLP", "heads": "attention heads"}


@dataclass(frozen=True)
class UnitLayout:
    """How a tensor holds its units along `axis` (as stored).

    For each of `sections`, all units one after the other with that many rows each; then `tail` rows that are no unit's.
    """

    axis: int
    sections: tuple[int, ...]
    tail: int = 0

    def rows(self, kept: torch.Tensor, units: int) -> torch.Tensor:
        """The rows along the axis that belong to the units `kept`, and the tail."""
        found, begin = [], 0
        for width in self.sections:
            found.append((begin + kept[:, None] * width + torch.arange(width)).flatten())
            begin += units * width
        return torch.cat([*found, torch.arange(begin, begin + self.tail)])

    def apply(self, tensor: torch.Tensor, kept: torch.Tensor, units: int) -> torch.Tensor:
        return tensor.index_select(self.axis, self.rows(kept, units)).contiguous()


@dataclass(frozen=True)
class CoupledGroup:
    """The MLP's channels or attention's heads of all blocks: `units` of them a block, of which `keep` stay.

    `consumers` maps a block to the map that reads the units, `width` inputs each; `cuts` and `blocks` have every tensor
    that shrinks; `changes` are the new values of the text config. `sizes` has blocks that keep another number.
    """

    name: GroupName
    units: int
    keep: int
    width: int
    consumers: Mapping[int, str]
    slices: Mapping[str, UnitLayout]
    blocks: Mapping[str, int]
    changes: Mapping[str, Any]
    sizes: Mapping[int, int] = field(default_factory=dict)

    def kept_in(self, block: int) -> int:
        """How many units stay in a block: `keep`, unless its size is its own."""
        return self.sizes.get(block, self.keep)

    def shapes(self, infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
        """The new shape of every tensor that shrinks, by its name in the checkpoint."""
        return {
            name: tuple(
                sum(cut.sections) * self.kept_in(self.blocks[name]) + cut.tail if axis == cut.axis else size
                for axis, size in enumerate(infos[name].entry.shape)
            )
            for name, cut in self.slices.items()
        }

    def producers(self, block: int, infos: Mapping[str, TensorInfo]) -> list[str]:
        """The matrices of a block that make the units."""
        return [
            name
            for name in self.slices
            if self.blocks[name] == block and name != self.consumers[block] and infos[name].role == "linear map"
        ]
