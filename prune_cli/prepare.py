"""Everything that is settled before any weight is touched: the checkpoint, the model on meta, the plan, the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from calibration.errors import CalibrationError
from calibration.sources import Role, parse_source
from calibration.sources import Source as TextSource
from calibration.tokens import TokenSet, load_tokens
from methods._allocation import mean_sparsity
from methods._pattern import Pattern, Unstructured
from prune_cli.allocation import FILE, STRATEGIES, read_allocation
from prune_cli.checkpoint import FLOATS, Checkpoint
from prune_cli.errors import RequestError
from prune_cli.model import Skeleton
from prune_cli.open_checkpoint import dequantised
from prune_cli.output_place import check_output, check_space
from prune_cli.packed.dequantised import Dequantised
from prune_cli.packed.output import as_asked, config_of_output, output_bytes
from prune_cli.pipeline import Pipeline
from prune_cli.plan import Decision, pattern_of, plan_tensors
from prune_cli.request import (
    DEFAULT_SAMPLES,
    DEFAULT_SEQ_LEN,
    DEFAULT_SOURCE,
    PruneRequest,
)
from prune_cli.source import Source, resolve_model
from prune_cli.sparse.decoded import refuse_sparse
from prune_cli.sparse.in_place import sparse_config
from prune_cli.sparse.side_by_side import FILES_AT_A_TIME

_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float32}
# Enough tokens a batch to keep the device busy; more only costs memory.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192, "mps": 4096}


@dataclass(frozen=True)
class Opened:
    """The model and the texts that a checked request names, on this machine.

    `calibration` is None where nothing needs a text.
    """

    source: Source
    checkpoint: Checkpoint
    model: Skeleton
    device: torch.device
    dtype: torch.dtype
    calibration: TextSource | None
    evaluation: TextSource | None
    trust_remote_code: bool

    def with_checkpoint(
        self, checkpoint: Checkpoint, config: Any | None = None, *, dtype: torch.dtype | None = None
    ) -> Skeleton:
        """The same model over other weights, as those of the output; `config` where they have other shapes."""
        return Skeleton(
            self.source.folder,
            checkpoint,
            dtype=dtype or self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            config=config,
        )


@dataclass(frozen=True)
class Prepared(Opened):
    """What a request for sparse weights means tensor by tensor; `pattern` is the one asked for, of the whole.

    `config` is the text of the output's config.json, None for the input's.
    """

    decisions: dict[str, Decision]
    pipeline: Pipeline
    pattern: Pattern
    allocation_file: dict[str, float] | None
    config: str | None

    def pruned_names(self, group: int | None = None) -> list[str]:
        """The tensors to prune: of one block, of what lies outside (group = number of blocks), or all of them."""
        blocks = len(self.model.blocks)
        return [
            name
            for name, decision in self.decisions.items()
            if decision.prune
            and (group is None or (blocks if decision.place.block is None else decision.place.block) == group)
        ]


def open_model(request: PruneRequest, *, needs_text: bool, writes: bool = True) -> Opened:
    """What every way of pruning needs; raises RequestError (or PruneError when the hub fails).

    Without `writes`, no checkpoint will be written to OUT, and it is not looked at.
    """
    calibration = (
        open_text(DEFAULT_SOURCE if request.calibration is None else request.calibration) if needs_text else None
    )
    evaluation = open_text(request.eval) if request.eval is not None else None
    device = pick_device(request.device)
    source = resolve_model(request.model, request.revision)
    checkpoint = Checkpoint.open(source.folder)
    refuse_sparse(checkpoint)
    checkpoint = as_asked(dequantised(checkpoint), request.packed, default=_packed_by_default(request))
    if writes:
        check_output(request.out, checkpoint, resume=request.resume, overwrite=request.overwrite)
    dtype = pick_dtype(request.dtype, device, checkpoint)
    model = Skeleton(source.folder, checkpoint, dtype=dtype, device=device, trust_remote_code=request.trust_remote_code)
    if calibration is not None or evaluation is not None:
        check_seq_len(model, request.seq_len)
    return Opened(source, checkpoint, model, device, dtype, calibration, evaluation, request.trust_remote_code)


def _packed_by_default(request: PruneRequest) -> str:
    """Who gives a packed model wants one back, where it can be. Raises RequestError for keep where it cannot."""
    new_values = request.method == "width" or (request.is_structured and _asks_for_refit(request))
    if new_values and request.packed == "keep":
        raise RequestError(
            f"--packed keep is for what leaves whole experts or blocks as they are, and {request.method} as it was "
            "asked for gives the rest new shapes or values: use --packed bf16."
        )
    return "bf16" if request.format == "sparse" or new_values else "keep"


def _asks_for_refit(request: PruneRequest) -> bool:
    return "refit" in request.options and bool(getattr(request.structured_options(), "fits", False))


def prepare(request: PruneRequest, *, writes: bool = True) -> Prepared:
    """Check all that can be checked without weights; raises as `open_model` does."""
    request.check()
    pipeline = request.pipeline()
    needs_text = bool(pipeline.needs) or request.calibration is not None or _allocation_needs_text(request)
    opened = open_model(request, needs_text=needs_text, writes=writes)
    config, sparse = config_of_output(opened.checkpoint), request.format == "sparse"
    if sparse:
        config = sparse_config(opened.checkpoint, config, self_contained=request.self_contained)
    if writes:
        nbytes = output_bytes(opened.checkpoint)
        check_space(request.out, nbytes + (_largest_files(opened.checkpoint) if sparse else 0))
    decisions = plan_tensors(opened.model, request, pipeline)
    allocation_file = _allocation_file(request, decisions)
    return Prepared(
        **vars(opened),
        decisions=decisions,
        pipeline=pipeline,
        pattern=pattern_of(request) if allocation_file is None else _mean_pattern(allocation_file, opened.checkpoint),
        allocation_file=allocation_file,
        config=config,
    )


def _largest_files(checkpoint: Checkpoint) -> int:
    """While files are encoded, they are there twice."""
    sizes = sorted((checkpoint.folder / file).stat().st_size for file in checkpoint.files)
    return sum(sizes[-FILES_AT_A_TIME:])


def _allocation_needs_text(request: PruneRequest) -> bool:
    return request.allocate in STRATEGIES and STRATEGIES[request.allocate].needs_text


def _allocation_file(request: PruneRequest, decisions: Mapping[str, Decision]) -> dict[str, float] | None:
    if not request.allocate.startswith(FILE):
        return None
    return read_allocation(request.allocate, [name for name, decision in decisions.items() if decision.prune])


def _mean_pattern(table: Mapping[str, float], checkpoint: Checkpoint) -> Unstructured:
    return Unstructured(mean_sparsity(table, {name: checkpoint.entries[name].count for name in table}))


def open_text(text: str) -> TextSource:
    if not text.strip():
        raise RequestError("The text to read is an empty name: give a file, a folder, or a name like builtin.")
    try:
        return parse_source(text)
    except CalibrationError as error:
        raise RequestError(str(error)) from error


def read_tokens(
    text: TextSource,
    model: Skeleton,
    tokenizer: Any | None,
    role: Role,
    samples: int | None,
    seq_len: int | None,
    seed: int,
) -> TokenSet:
    """Windows of `text` in the model's own tokens. Raises RequestError for text that does not do."""
    try:
        tokens = load_tokens(
            text,
            tokenizer,
            role=role,
            samples=samples,
            seq_len=seq_len,
            default_samples=DEFAULT_SAMPLES,
            default_seq_len=min(DEFAULT_SEQ_LEN, model.position_limit or DEFAULT_SEQ_LEN),
            seed=seed,
            vocab_size=model.vocab_size,
        )
    except CalibrationError as error:
        raise RequestError(str(error)) from error
    length, limit = tokens.ids.shape[1], model.position_limit
    if limit is not None and length > limit:
        raise RequestError(
            f"{text.given} holds samples of {length} tokens, but the model takes at most {limit} positions: cut them."
        )
    return tokens


def check_seq_len(model: Skeleton, seq_len: int | None) -> None:
    limit = model.position_limit
    if seq_len is not None and limit is not None and seq_len > limit:
        raise RequestError(f"--seq-len is {seq_len}, but the model takes at most {limit} positions.")


def pick_device(asked: str) -> torch.device:
    """The torch device for --device; raises RequestError where there is none such."""
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(asked)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise RequestError(f"--device is {asked}, but torch sees {count} CUDA devices here: use auto or cpu.")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RequestError("--device is mps, but torch sees no Metal device here: use auto or cpu.")
    return device


def pick_dtype(asked: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the forward pass: float32 on a CPU, elsewhere what most of the checkpoint is stored in."""
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]
    if device.type == "cpu":
        return torch.float32
    weights: Counter[str] = Counter()
    plain = checkpoint.as_half() if isinstance(checkpoint, Dequantised) else checkpoint
    for entry in plain.entries.values():
        if entry.dtype in FLOATS:
            weights[entry.dtype] += entry.count
    return _STORED[weights.most_common(1)[0][0]] if weights else torch.float32


def pick_batch_size(asked: int | Literal["auto"], device: torch.device, seq_len: int) -> int:
    return asked if asked != "auto" else max(1, _BATCH_TOKENS.get(device.type, 2048) // seq_len)
