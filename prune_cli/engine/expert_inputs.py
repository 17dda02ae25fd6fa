"""The inputs of experts at a pause, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prune_cli.engine.stream import Stream
from prune_cli.model.moe import routed
from prune_cli.model.routed import Routed
from prune_cli.model.tensor_info import TensorInfo

# With fewer tokens an expert is pruned by those of all tokens, whoever they were sent to.
_FEWEST_TOKENS = 32


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
            groups.setdefault(info.expert.module, {})[name] = info
    return groups


def at_experts(stream: Stream, module: str) -> AtExperts:
    """What `stream` has at a stop at the experts called `module`."""
    experts = stream.model.model.get_submodule(module)
    return AtExperts(
        experts,
        [routed(experts, each, batch.mask) for each, batch in zip(stream.arguments(), stream.here(), strict=True)],
    )


def tokens_of(expert: int, batches: Sequence[Routed]) -> tuple[list[torch.Tensor], list[str]]:
    """The numbers of the expert's tokens, batch by batch; where they are too few those of all, and a note on it."""
    tokens = [batch.tokens_of(expert) for batch in batches]
    count = sum(len(each) for each in tokens)
    if count >= _FEWEST_TOKENS:
        return tokens, []
    everything = [batch.all_tokens() for batch in batches]
    note = f"only {count} calibration tokens were sent to this expert: pruned by what all tokens would give it"
    return everything, [note]
