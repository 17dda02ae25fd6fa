"""What one tensor of a checkpoint is in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.model.moe import ExpertPart
from prune_cli.model.roles import Role


@dataclass(frozen=True)
class TensorInfo:
    """What one checkpoint tensor is in the model: `block` is None outside the blocks, `parameter` None if unused.

    `expert` is there for matrices of experts that can be pruned. Without a parameter, `layer` is the number of the
    block that the name tells, which may be beyond the last, `head` the extra head (`mtp`, `model.layers.61`), and
    `head_role` what the tensor is in it; `twin` is the model's tensor that goes by the same name in another block.
    """

    entry: TensorEntry
    role: Role
    block: int | None
    parameter: str | None
    transposed: bool
    reason: str
    expert: ExpertPart | None = None
    layer: int | None = None
    head: str | None = None
    head_role: Role | None = None
    twin: str | None = None

    @property
    def slices(self) -> int:
        """How many matrices the tensor holds: one, or that of each expert."""
        return self.expert.experts if self.expert is not None and self.expert.index is None else 1

    @property
    def module_name(self) -> str:
        assert self.parameter is not None
        return self.parameter.rpartition(".")[0]


def unknown_in_blocks(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors of blocks that the model has not: with them it may well be meant to be another one."""
    return [name for name, info in infos.items() if info.role == "unknown" and info.layer is not None]
