"""What a recovery tells: one typed report, recover_report.json, whose JSON Schema is derived from these classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, Literal

from prune_cli.recovery.request import RecoverRequest, recover_request_as_json
from prune_cli.report.from_json import from_json
from prune_cli.report.types import (
    BlockRecovery,
    Count,
    Environment,
    Evaluation,
    NotNegative,
    Output,
    Positive,
    PrunedModel,
    Role,
    TextReport,
    Tool,
)
from prune_cli.request.json_schema import Keywords, schema_of

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RecoveredTensor:
    """One tensor: whether it was trained, why not if not, and its zeros, the same before and after."""

    name: str
    role: Role
    block: Count | None
    shape: tuple[Count, ...]
    dtype: str
    action: Literal["trained", "kept"]
    reason: str
    zeros: Count | None


@dataclass(frozen=True)
class Losses:
    """Of the dense model, the pruned one and what became of it, on text that no training has seen."""

    text: TextReport
    protocol: str
    dense: Evaluation
    before: Evaluation
    after: Evaluation

    @property
    def won_back(self) -> float | None:
        """The share of the loss's increase that is gone; None where pruning had cost nothing."""
        lost = self.before.loss - self.dense.loss
        return (self.before.loss - self.after.loss) / lost if lost > 0 else None


@dataclass(frozen=True)
class FittedText:
    """The text that was read, how many of its samples were held out, and how many the teacher sampled beside it."""

    text: TextReport
    held_out: Positive
    sampled: Count


@dataclass(frozen=True)
class TrainingLook:
    """At the held-out samples after `step` steps: their KL, and the mean loss of the steps since the look before."""

    step: Count
    tokens: Count
    loss: float | None
    held_out: float


@dataclass(frozen=True)
class TrainingRun:
    """An end-to-end training of so many `steps`, of which the best look was kept, 0 for the start.

    It ended with its budget, early, as nothing had been better for some looks, or in NaN. `teacher_bytes` is what the
    teacher's predictions of a token take.
    """

    steps: Positive
    best_step: Count
    ended: Literal["budget", "early", "nan"]
    looks: Sequence[TrainingLook]
    teacher_bytes: Positive
    seconds: NotNegative


@dataclass(frozen=True, kw_only=True)
class RecoveryReport:
    """Everything about one recovery; `zeros` are those of all its tensors, in the files read and written."""

    schema_version: Annotated[int, Keywords(const=SCHEMA_VERSION)]
    tool: Tool
    created: Annotated[str, Keywords(format="date-time")]
    request: RecoverRequest
    environment: Environment
    model: PrunedModel
    teacher: PrunedModel
    output: Output
    calibration: FittedText
    losses: Losses
    parameters: Count
    trained_parameters: Count
    zeros: Count
    blocks: Sequence[BlockRecovery]
    training: TrainingRun | None
    tensors: Sequence[RecoveredTensor]
    seconds: NotNegative
    peak_host_bytes: Count
    peak_device_bytes: Count | None
    warnings: Sequence[str]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RecoveryReport:
        """The report of a document that is valid by `recovery_schema`."""
        return from_json(cls, document)

    def to_json(self) -> str:
        document = asdict(self) | {"request": recover_request_as_json(self.request)}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


@cache
def recovery_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every report of a recovery satisfies."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"recover_report-{SCHEMA_VERSION}",
        "title": f"recover_report.json of prune-cli, schema version {SCHEMA_VERSION}",
        **schema_of(RecoveryReport),
    }
