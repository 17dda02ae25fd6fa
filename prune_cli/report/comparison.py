"""A model beside the dense one, as `prune-cli eval --against` measures it."""

from __future__ import annotations

from dataclasses import dataclass

from prune_cli.report.types import Evaluation


@dataclass(frozen=True)
class Comparison:
    """A model against a dense one on the same windows: means over predicted tokens, differences in nats."""

    model: Evaluation
    dense: Evaluation
    loss_increase: float
    loss_increase_standard_error: float
    kl_from_dense: float
    top1_agreement: float
