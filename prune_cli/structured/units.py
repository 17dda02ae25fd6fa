"""What is cut out of a model together: one unit in every tensor that holds a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from prune_cli.model.tensor_info import TensorInfo

GroupName = Literal["mlp", "heads", "experts", "shared"]


WORDS: dict[GroupName, str] = {
    "mlp": "channels of the MLP",
    "heads": "attention heads",
    "experts": "channels of every expert",
    "shared": "channels of the shared experts",
}


@dataclass(frozen=True)
class UnitLayout:
    """How a tensor holds its units along `axis` (as stored).

    For each of `sections`, all units one after the other with that many rows each; then `tail` rows that are no unit's.
    Of experts, each of which keeps units of its own, a tensor holds one (`expert`) or all along axis 0 (`stacked`).
    """

    axis: int
    sections: tuple[int, ...]
    tail: int = 0
    expert: int | None = None
    stacked: bool = False

    def rows(self, kept: torch.Tensor, units: int) -> torch.Tensor:
        """The rows along the axis that belong to the units `kept`, and the tail."""
        found, begin = [], 0
        for width in self.sections:
            found.append((begin + kept[:, None] * width + torch.arange(width)).flatten())
            begin += units * width
        return torch.cat([*found, torch.arange(begin, begin + self.tail)])

    def apply(self, tensor: torch.Tensor, kept: torch.Tensor, units: int) -> torch.Tensor:
        """`tensor` without the units that are not among `kept`: (keep,), or (experts, keep)."""
        if self.stacked:
            parts = zip(tensor, kept, strict=True)
            return torch.stack([part.index_select(self.axis - 1, self.rows(own, units)) for part, own in parts])
        return tensor.index_select(self.axis, self.rows(self._own(kept), units)).contiguous()

    def put(self, whole: torch.Tensor, tensor: torch.Tensor, kept: torch.Tensor, units: int) -> torch.Tensor:
        """`whole` with what `apply` left of a tensor, `tensor`, in its places."""
        if self.stacked:
            for part, left, own in zip(whole, tensor, kept, strict=True):
                part.index_copy_(self.axis - 1, self.rows(own, units), left)
            return whole
        return whole.index_copy_(self.axis, self.rows(self._own(kept), units), tensor)

    def zeroed(self, tensor: torch.Tensor, kept: torch.Tensor, units: int) -> torch.Tensor:
        """`tensor` with zeros for the units that are not among `kept`."""
        return self.put(torch.zeros_like(tensor), self.apply(tensor, kept, units), kept, units)

    def _own(self, kept: torch.Tensor) -> torch.Tensor:
        return kept if self.expert is None else kept[self.expert]


@dataclass(frozen=True)
class CoupledGroup:
    """The MLP's channels or attention's heads of all blocks: `units` of them a block, of which `keep` stay.

    `consumers` maps a block to the layer that reads the units, `width` inputs each; `slices` and `blocks` have every
    tensor that shrinks; `changes` are the new values of the text config. `sizes` has blocks that keep another number.
    Of `experts`, each has so many units, and `consumers` has the last layer of one of them, which stands for all.
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
    experts: int = 1

    def reads(self, name: str, infos: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensor `name` is a linear layer that reads the units."""
        expert = infos[name].expert
        return name in self.consumers.values() or (name in self.slices and expert is not None and expert.down)

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Units of one block that might stay: (keep,), or (experts, keep)."""
        drawn = [
            torch.randperm(self.units, generator=generator)[: self.keep].sort().values for _ in range(self.experts)
        ]
        return torch.stack(drawn) if self.name == "experts" else drawn[0]

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
