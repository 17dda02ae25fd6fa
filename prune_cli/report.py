"""What a run tells: one typed report, written as JSON (report.schema.json) and Markdown, shown by `render.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from calibration.tokens import TokenSet
from prune_cli.evaluate import Evaluation
from prune_cli.page.figures import change_of, size
from prune_cli.report_schema import SCHEMA_VERSION as SCHEMA_VERSION
from prune_cli.report_schema import report_schema as report_schema


@dataclass(frozen=True)
class TensorReport:
    """One tensor. Sparsities are measured on the written file; `output_error` on calibration text.

    A tensor of a structured output goes by its new name and shape; one that is gone by its old.
    """

    name: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    dtype: str
    action: Literal["pruned", "kept", "narrowed", "refitted", "removed"]
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
    """Counts of weights; `sparsity` is the share of zeros among the pruned tensors and among all.

    Bytes are those of the files; `bytes_as_sparse` is about what those of a dense output would take stored sparse.
    """

    parameters: int
    pruned_parameters: int
    zeros_in_pruned: int
    sparsity_of_pruned: float
    sparsity_of_model: float
    bytes_before: int
    bytes_after: int
    bytes_as_sparse: int | None = None


@dataclass(frozen=True)
class Size:
    """A model's size. Bytes are those of its files; the cache's are per token of context in the checkpoint's dtype.

    `macs_per_token` counts the weight matrices alone, not attention over the context. None where it cannot be told.
    """

    parameters: int
    bytes: int
    blocks: int
    kv_cache_bytes_per_token: int | None
    macs_per_token: int


@dataclass(frozen=True)
class BlockChange:
    """A block of the input: its number in the output (None if it is gone), what was removed of it, and why."""

    block: int
    new_block: int | None
    removed: str
    why: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class StructureReport:
    """What a structured method removed. `removed_shares` has one share of each kind: of units, of parameters."""

    unit: str
    units_before: int
    units_after: int
    asked: str
    removed_shares: Mapping[str, float]
    before: Size
    after: Size
    blocks: Sequence[BlockChange]
    notes: Sequence[str]


@dataclass(frozen=True)
class Report:
    """Everything about one run. Sparse weights have an `allocation`, smaller dense models a `structure`."""

    schema_version: int
    tool: Mapping[str, str]
    created: str
    request: Mapping[str, Any]
    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    output: Mapping[str, Any]
    method: Mapping[str, Any]
    allocation: Mapping[str, Any] | None
    calibration: TextReport | None
    output_error_rows: int | None
    evaluation: EvaluationReport | None
    totals: Totals
    structure: StructureReport | None
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
    return TextReport(
        tokens.source, tokens.protocol, samples, length, tokens.windows.tokens, tokens.seed, tokens.sha256
    )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def gain_of_sparse_files(pattern: str, dense: int, sparse: int) -> str:
    """What sparse files of `sparse` bytes bring beside dense ones."""
    change = change_of(dense, sparse)
    kernels = (
        " Runtimes with kernels for this pattern (2:4 on recent NVIDIA GPUs) can use it." if ":" in pattern else ""
    )
    return (
        f"The sparse files take {size(sparse)} where dense ones take {size(dense)} ({change}); loaded with "
        f"import prune_cli they give the dense model, which is in memory no smaller and no faster.{kernels}"
    )


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
