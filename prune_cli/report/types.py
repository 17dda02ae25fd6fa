"""What a run tells: one typed report, written as JSON (`report_schema`) and read back from it, shown by all the rest.

The JSON Schema is derived from these classes: their docstrings, types and keywords are what it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from prune_cli.report.continuations import Continuation
from prune_cli.report.from_json import from_json
from prune_cli.report.memory import MemoryPlan
from prune_cli.report.numbers import Count, NotNegative, Positive, Share
from prune_cli.report.processes import Processes
from prune_cli.report.task_scores import TaskScores
from prune_cli.request.json_schema import Keywords
from prune_cli.request.request import PruneRequest, request_as_json, split_pattern

SCHEMA_VERSION = 1

Sha256 = Annotated[str, Keywords(pattern="^[0-9a-f]{64}$")]
Role = Annotated[
    str,
    Keywords(
        enum=[
            "linear map", "embedding", "output head", "norm", "router", "bias", "expert", "attention expert",
            "convolution", "other", "extra head", "unused", "unknown",
        ]
    ),
]  # fmt: skip


@dataclass(frozen=True)
class TensorReport:
    """One tensor. Sparsities are measured on the written file; `output_error` on calibration text.

    A tensor of a structured output goes by its new name and shape; one that is gone by its old. `dtype` is that in the
    file, where weights are packed that of their codes; shapes and zeros are those of values.
    """

    name: str
    role: Role
    block: Count | None
    shape: tuple[Count, ...]
    dtype: str
    action: Literal["pruned", "kept", "narrowed", "refitted", "removed"]
    reason: str
    pattern: str | None
    asked_sparsity: Share | None
    sparsity: Share | None
    output_error: NotNegative | None
    notes: tuple[str, ...]

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) of its pattern, None for a fraction or none at all. Raises RequestError for neither."""
        return split_pattern(self.pattern) if self.pattern is not None and ":" in self.pattern else None


@dataclass(frozen=True)
class BlockReport:
    """`seconds` spent on the block; `resumed` if an earlier, interrupted run had done it."""

    index: Annotated[Count, Keywords(description="The number of blocks stands for what lies outside them.")]
    seconds: NotNegative
    resumed: bool


@dataclass(frozen=True)
class BlockRecovery:
    """One block, trained to give what the dense model, the teacher, has behind its `teacher_blocks`.

    Errors are ||B - y||^2 / ||y||^2 of the block's outputs on held-out samples: before, after, and behind each epoch.
    `best_epoch` is the one that was kept, 0 for the block as it was.
    """

    block: Count
    teacher_blocks: tuple[Count, ...]
    error_before: NotNegative
    error_after: NotNegative
    epochs: tuple[NotNegative, ...]
    best_epoch: Count
    seconds: NotNegative
    resumed: bool


@dataclass(frozen=True)
class TextReport:
    """Which text was used and how; `sha256` is that of the token ids."""

    source: str
    protocol: str
    samples: Positive
    seq_len: Positive
    tokens: Positive
    seed: int | None
    sha256: Sha256


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

    parameters: Count
    pruned_parameters: Count
    zeros_in_pruned: Count
    sparsity_of_pruned: Share
    sparsity_of_model: Share
    bytes_before: Count
    bytes_after: Count
    bytes_as_sparse: Count | None = None


@dataclass(frozen=True)
class Size:
    """A model's size. Bytes are those of its files; the cache's are per token of context in the checkpoint's dtype.

    `macs_per_token` counts the weight matrices alone, not attention over the context. None where it cannot be told.
    """

    parameters: Count
    bytes: Count
    blocks: Count
    kv_cache_bytes_per_token: Count | None
    macs_per_token: Count


@dataclass(frozen=True)
class BlockChange:
    """A block of the input: its number in the output (None if it is gone), what was removed of it, and why."""

    block: Count
    new_block: Count | None
    removed: str
    why: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class ExpertUse:
    """The share of the tokens of a block's mixture that an expert of the input gets, by either text."""

    block: Count
    expert: Count
    kept: bool
    share: Share
    compared_share: Share


@dataclass(frozen=True)
class ExpertComparison:
    """How another text than the calibration's uses the experts, all of them, block by block."""

    text: TextReport
    experts: Sequence[ExpertUse]


@dataclass(frozen=True)
class StructureReport:
    """What a structured method removed. `removed_shares` has one share of each kind: of units, of parameters."""

    unit: str
    units_before: Count
    units_after: Count
    asked: str
    removed_shares: Mapping[str, Share]
    before: Size
    after: Size
    blocks: Sequence[BlockChange]
    notes: Sequence[str]
    compared: ExpertComparison | None = None


@dataclass(frozen=True)
class NotLoaded:
    """Tensors of the input that transformers leaves out when it loads the model: an extra head, or some that are alike.

    `name` stands for all of them; sizes are those of the input; `became` tells what the output has of them.
    """

    name: str
    kind: Literal["extra head", "ignored by the class", "unknown to the class"]
    tensors: Positive
    parameters: Count
    bytes: Count
    became: Annotated[str, Keywords(minLength=1)]


@dataclass(frozen=True)
class Tool:
    name: Annotated[str, Keywords(const="prune-cli")]
    version: str


@dataclass(frozen=True)
class Environment:
    """Where a run ran; `batch_size` is None where no text was needed, `omp_wait_policy` where OpenMP chooses."""

    python: str
    versions: Mapping[str, str]
    platform: str
    device: str
    compute_dtype: str
    threads: Positive
    batch_size: Positive | None
    omp_wait_policy: str | None = None


@dataclass(frozen=True)
class PrunedModel:
    """What was pruned; `revision` is the hub's commit, `files` maps each shard to its sha256."""

    given: str
    revision: str | None
    architecture: str
    files: Mapping[str, Sha256]

    @property
    def name(self) -> str:
        """A hub id as it is; of a folder its last part."""
        return self.given if self.revision else self.given.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Output:
    """`dense_files` are of the dense files that the sparse ones of --format sparse stand for."""

    folder: str
    files: Mapping[str, Sha256]
    dense_files: Mapping[str, Sha256] = field(default_factory=dict)

    def hashes(self) -> dict[str, frozenset[str]]:
        """The sha256 that each weight file may have: as it was written or, where that is sparse, of its dense form."""
        dense = self.dense_files
        return {name: frozenset({sha256, dense.get(name, sha256)}) for name, sha256 in self.files.items()}


@dataclass(frozen=True)
class MethodReport:
    name: str
    summary: str
    papers: Annotated[Sequence[str], Keywords(minItems=1)]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class AllocationReport:
    """How the sparsity was spread: by tensor name, with `facts` that it was chosen from."""

    schema_version: Annotated[int, Keywords(const=1)]
    strategy: Annotated[str, Keywords(pattern="^(uniform|erk|owl|atp|sensitivity|global|file:.+)$")]
    options: Mapping[str, Any]
    sparsity: Mapping[str, Annotated[float, Keywords(minimum=0, exclusiveMaximum=1)]]
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything about one run. Sparse weights have an `allocation`, smaller dense models a `structure`.

    `inputs` has the sha256 of all that was read, calibration before windows of the model's own were added.
    The last `sampled` calibration samples are such. `output_error_rows` stand for the calibration tokens in
    output_error; as many as tokens means exact. `tasks` were measured afterwards; `matched` is what --match-blocks did
    to each block, or -o after= to those that lost experts.
    """

    schema_version: Annotated[int, Keywords(const=SCHEMA_VERSION)]
    tool: Tool
    created: Annotated[str, Keywords(format="date-time")]
    request: PruneRequest
    environment: Environment
    processes: Processes | None = None
    model: PrunedModel
    inputs: Mapping[str, Sha256] = field(default_factory=dict)
    output: Output
    method: MethodReport
    allocation: AllocationReport | None
    calibration: TextReport | None
    sampled: Count = 0
    output_error_rows: Positive | None
    evaluation: EvaluationReport | None
    continuations: tuple[Continuation, ...] = ()
    tasks: TaskScores | None = None
    totals: Totals
    structure: StructureReport | None = None
    gain: Annotated[str, Keywords(minLength=1)]
    blocks: Sequence[BlockReport]
    matched: Sequence[BlockRecovery] = ()
    tensors: Annotated[Sequence[TensorReport], Keywords(minItems=1)]
    seconds: NotNegative
    peak_host_bytes: Count
    peak_device_bytes: Count | None
    memory: MemoryPlan | None = None
    warnings: Sequence[str]
    not_loaded: tuple[NotLoaded, ...] = ()

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Report:
        """The report of a document that is valid by `report_schema`."""
        return from_json(cls, document)

    def to_json(self) -> str:
        document = asdict(self) | {"request": request_as_json(self.request)}
        if not self.matched:
            del document["matched"]  # as in every report of a run without --match-blocks or -o after=
        if self.tasks is None:
            del document["tasks"]  # until eval --add-to-report adds some
        if self.processes is None:
            del document["processes"]  # as in every report of one process
        if self.memory is None:
            del document["memory"]  # as in every report of a run that had enough
        if not self.output.dense_files:
            del document["output"]["dense_files"]  # as in every report of dense files
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per predicted token, with the standard error of its mean over windows."""

    perplexity: Annotated[float, Keywords(minimum=1)]
    loss: NotNegative
    loss_standard_error: NotNegative
    windows: Positive
    predicted_tokens: Positive
