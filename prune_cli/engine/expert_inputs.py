"""The inputs of experts at a pause, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from prune_cli.engine.stream import Stream
from prune_cli.model.moe import routed
from prune_cli.model.routed import Routed
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.ranks.ranks import ALONE, Ranks

# With fewer tokens an expert is pruned by those of all tokens, whoever they were sent to.
_FEWEST_TOKENS = 32


@dataclass(frozen=True)
class AtExperts:
    """A model whose batches wait at the experts `module` of a block; its weights may change in between."""

    module: nn.Module
    batches: Sequence[Routed]
    ranks: Ranks = ALONE

    @cached_property
    def _chosen(self) -> Sequence[torch.Tensor]:
        """Of every batch, on the host: all at once, for each by itself would have the device wait."""
        if not self.batches:
            return []
        chosen = torch.cat([batch.chosen for batch in self.batches]).cpu()
        return chosen.split([len(batch.chosen) for batch in self.batches])

    def tokens_of(self, expert: int) -> list[torch.Tensor]:
        """Of every batch the numbers of the tokens that `expert` gets, in their order."""
        return [
            (chosen == expert).any(-1).nonzero().flatten().to(batch.chosen.device)
            for batch, chosen in zip(self.batches, self._chosen, strict=True)
        ]

    @property
    def every_token(self) -> bool:
        """Whether all batches of all ranks tell of every token, whatever its experts; a step of every rank."""
        return self.ranks.all_agree(all(batch.every_token for batch in self.batches))


@dataclass(frozen=True)
class ExpertTokens:
    """`numbers` of an expert's tokens, batch by batch; all ranks have `total`, those before this one `before`."""

    numbers: Sequence[torch.Tensor]
    total: int
    before: int
    notes: tuple[str, ...] = ()


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
        stream.ranks,
    )


def tokens_of_experts(here: AtExperts, experts: int) -> list[ExpertTokens]:
    """Of each of the `experts`; where they are too few those of all, and a note on it. A step of every rank."""
    everything = [batch.all_tokens() for batch in here.batches]
    numbers = [here.tokens_of(expert) for expert in range(experts)]
    counts = here.ranks.gathered([sum(map(len, each)) for each in (*numbers, everything)])
    found = []
    for expert, own in enumerate(numbers):
        count = sum(of_rank[expert] for of_rank in counts)
        if count >= _FEWEST_TOKENS:
            found.append(ExpertTokens(own, count, sum(of_rank[expert] for of_rank in counts[: here.ranks.rank])))
            continue
        note = f"only {count} calibration tokens were sent to this expert: pruned by what all tokens would give it"
        total, before = (sum(of_rank[-1] for of_rank in some) for some in (counts, counts[: here.ranks.rank]))
        found.append(ExpertTokens(everything, total, before, (note,)))
    return found
