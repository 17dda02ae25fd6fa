"""What a run tells: one typed report, written as JSON (report.schema.json) and Markdown, shown by `render.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from calibration.tokens import TokenSet
from prune_cli.evaluate import Evaluation
from prune_cli.report_schema import SCHEMA_VERSION as SCHEMA_VERSION
from prune_cli.report_schema import report_schema as report_schema


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the checkpoint. Sparsities are measured on the written file; `output_error` on calibration text."""

    name: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    dtype: str
    action: Literal["pruned", "kept"]
    reason: str
    pattern: str | None
    asked_sparsity: float | None
    sparsity: float | None
    output_error: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BlockReport:
    """`seconds` spent on the block; `resumed` if an earlier, interrupted run had done it."""

    index: int
    seconds: float
    resumed: bool


@dataclass(frozen=True)
class TextReport:
    """Which text was used and how; `sha256` is that of the token ids."""

    source: str
    protocol: str
    samples: int
    seq_len: int
    tokens: int
    seed: int | None
    sha256: str


@dataclass(frozen=True)
class EvaluationReport:
    text: TextReport
    protocol: str
    before: Evaluation
    after: Evaluation


@dataclass(frozen=True)
class Totals:
    """Counts of weights; `sparsity` is the share of zeros among the pruned tensors and among all."""

    parameters: int
    pruned_parameters: int
    zeros_in_pruned: int
    sparsity_of_pruned: float
    sparsity_of_model: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Report:
    """Everything about one run."""

    schema_version: int
    tool: Mapping[str, str]
    created: str
    request: Mapping[str, Any]
    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    output: Mapping[str, Any]
    method: Mapping[str, Any]
    allocation: Mapping[str, Any]
    calibration: TextReport | None
    output_error_rows: int | None
    evaluation: EvaluationReport | None
    totals: Totals
    gain: str
    blocks: Sequence[BlockReport]
    tensors: Sequence[TensorReport]
    seconds: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    warnings: Sequence[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def text_report(tokens: TokenSet) -> TextReport:
    samples, length = tokens.ids.shape
    return TextReport(tokens.source, tokens.protocol, samples, length, samples * length, tokens.seed, tokens.sha256)


def gain_of_zeros(pattern: str) -> str:
    """What zeros in a dense file bring, said plainly."""
    if ":" in pattern:
        return (
            f"The {pattern} zeros make the file no smaller and plain transformers no faster by themselves; "
            "runtimes with kernels for this pattern (2:4 on recent NVIDIA GPUs) can use them."
        )
    return (
        "Unstructured zeros make the file no smaller and the model no faster by themselves; "
        "they pay off with a sparse or compressed storage or a runtime for sparse weights."
    )
