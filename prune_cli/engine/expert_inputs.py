"""The inputs of experts at a pause, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from prune_cli.engine.stream import Stream
from prune_cli.model.moe import Routed
from prune_cli.model.tensor_info import TensorInfo


@dataclass(frozen=True)
class AtExperts:
    """A model whose batches wait at the experts `module` of a block; its weights may change in between."""

    module: nn.Module
    batches: Sequence[Routed]


def experts_by_module(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of experts, grouped by the module that computes with them."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        if info.expert is not None:
            groups.setdefault(info.module_name, {})[name] = info
    return groups


def at_experts(stream: Stream, module: str) -> AtExperts:
    """What `stream` has at a stop at the experts called `module`."""
    experts = stream.model.model.get_submodule(module)
    return AtExperts(
        experts,
        [Routed.of(experts, each, batch.mask) for each, batch in zip(stream.arguments(), stream.here(), strict=True)],
    )
