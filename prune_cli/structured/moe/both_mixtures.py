"""A block at whose experts two models wait: the dense one and the one with fewer experts, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calibration.statistics import sum_dtype
from prune_cli.engine.expert_inputs import AtExperts
from prune_cli.model.moe import outputs_of
from prune_cli.structured.moe.mixtures import Mixture


@dataclass(frozen=True)
class BothMixtures:
    """`smaller` has `mixture`, `dense` has `dense_mixture`; `fitted` tells of every batch whether it is fitted.

    The others are held out. Batches are this rank's.
    """

    smaller: AtExperts
    mixture: Mixture
    dense: AtExperts
    dense_mixture: Mixture
    fitted: Sequence[bool]

    def targets(self) -> list[torch.Tensor]:
        """Of every batch (tokens, hidden) float32: what the dense experts make of the dense model's tokens."""
        return mixture_outputs(self.dense, self.dense_mixture)

    def outputs(self) -> list[torch.Tensor]:
        """As `targets`, of the smaller model as it now is."""
        return mixture_outputs(self.smaller, self.mixture)

    def error(self, outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> float:
        """||y - outputs||^2 / ||y||^2 over the held-out tokens of all ranks; a step of every rank."""
        missed, wanted = 0.0, 0.0
        for each, target, fitted in zip(outputs, targets, self.fitted, strict=True):
            if not fitted:
                missed += _square(target - each)
                wanted += _square(target)
        parts = self.smaller.ranks.gathered((missed, wanted))
        missed, wanted = (sum(part[at] for part in parts) for at in (0, 1))
        return missed / wanted if wanted else 0.0


def _square(values: torch.Tensor) -> float:
    return float(values.to(sum_dtype(values.device)).square().sum())


def mixture_outputs(here: AtExperts, mixture: Mixture) -> list[torch.Tensor]:
    """Of every batch (tokens, hidden) float32: the sum of the outputs of each token's experts times their gates."""
    outputs = [
        torch.zeros(batch.hidden.shape, dtype=torch.float32, device=batch.hidden.device) for batch in here.batches
    ]
    for expert in range(mixture.experts + mixture.identities):
        for batch, tokens, total in zip(here.batches, here.tokens_of(expert), outputs, strict=True):
            if len(tokens):
                rows = batch.hidden[tokens]
                made = rows if expert >= mixture.experts else outputs_of(here.module, expert, rows)
                total.index_add_(0, tokens, made.float() * batch.gates_of(expert, tokens).float()[:, None])
    return outputs
