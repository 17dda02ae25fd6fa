"""What a sweep tells: one typed report, written as JSON (sweep.schema.json) and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from prune_cli.report.types import Evaluation, TextReport
from prune_cli.sweeps.knee import Knee

SCHEMA_VERSION = 1
SWEEP_JSON, SWEEP_CSV, BLOCKS_CSV = "sweep.json", "sweep.csv", "blocks.csv"


@dataclass(frozen=True)
class PointReport:
    """One point: `asked_sparsity` of an N:M pattern is its own; `sparsity` is the share of zeros that were made.

    The loss increase over the dense model is in nats per token, with the standard error of its mean over windows;
    `seconds` are those of the points that went side by side, shared evenly; `size` is the share of the dense bytes that
    about stays in a sparse file.
    """

    method: str
    pattern: str | None
    asked_sparsity: float
    sparsity: float
    evaluation: Evaluation
    loss_increase: float
    loss_increase_standard_error: float
    seconds: float
    size: float = 1.0


@dataclass(frozen=True)
class KneeReport:
    method: str
    knee: Knee


@dataclass(frozen=True)
class BlockSensitivity:
    """What pruning this block alone costs."""

    block: int
    sparsity: float
    loss_increase: float
    loss_increase_standard_error: float


@dataclass(frozen=True)
class Sensitivity:
    method: str
    asked_sparsity: float
    blocks: Sequence[BlockSensitivity]


@dataclass(frozen=True)
class SweepReport:
    """Everything about one sweep."""

    schema_version: int
    tool: Mapping[str, str]
    created: str
    request: Mapping[str, Any]
    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    protocol: str
    text: TextReport
    calibration: TextReport | None
    dense: Evaluation
    points: Sequence[PointReport]
    knee_definition: str
    knees: Sequence[KneeReport]
    sensitivity: Sensitivity | None
    seconds: float
    warnings: Sequence[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """A line per point, the dense model first."""
        dense = PointReport("dense", None, 0.0, 0.0, self.dense, 0.0, 0.0, 0.0)
        lines = [_line(point) for point in (dense, *self.points)]
        return _csv(list(lines[0]), [list(line.values()) for line in lines])

    def blocks_csv(self) -> str:
        """A line per block that was pruned alone."""
        found = self.sensitivity.blocks if self.sensitivity else ()
        header = ("block", "sparsity", "loss_increase", "loss_increase_standard_error")
        return _csv(header, [tuple(asdict(block).values()) for block in found])


def _line(point: PointReport) -> dict[str, Any]:
    return {
        "method": point.method,
        "pattern": point.pattern or "",
        "asked_sparsity": point.asked_sparsity,
        "sparsity": point.sparsity,
        "perplexity": point.evaluation.perplexity,
        "loss": point.evaluation.loss,
        "loss_standard_error": point.evaluation.loss_standard_error,
        "loss_increase": point.loss_increase,
        "loss_increase_standard_error": point.loss_increase_standard_error,
        "seconds": point.seconds,
        "size": point.size,
    }


def _csv(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


@cache
def sweep_schema() -> dict[str, Any]:
    """The JSON Schema that every sweep.json satisfies."""
    return json.loads(resources.files("prune_cli.sweeps").joinpath("sweep.schema.json").read_text(encoding="utf-8"))
