"""Scores on tasks, and how much of the dense model's is left."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task; `against` is the dense model's, `difference` is MODEL's minus that.

    `recovery` is MODEL's over that; its standard error takes both models as independent, unless one tells otherwise.
    """

    task: str
    metric: str
    score: float
    standard_error: float | None
    against: float | None
    against_standard_error: float | None
    difference: float | None
    higher_is_better: bool | None
    examples: int | None
    shots: int | None
    recovery: float | None = None
    recovery_standard_error: float | None = None


@dataclass(frozen=True)
class TaskScores:
    """All metrics of all tasks, groups included; `harness` names what measured them, with its version."""

    harness: str
    model: str
    against: str | None
    limit: int | None
    device: str
    compute_dtype: str
    scores: tuple[TaskScore, ...]


def recovery_error(
    score: float, error: float | None, against: float, against_error: float | None, covariance: float = 0
) -> float | None:
    """The standard error of score / against, to first order; `covariance` is that of the two means."""
    if error is None or against_error is None or against == 0:
        return None
    ratio = score / against
    variance = error**2 + (ratio * against_error) ** 2 - 2 * ratio * covariance
    return math.sqrt(max(variance, 0.0)) / abs(against)
