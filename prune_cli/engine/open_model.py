"""The model that a request names, opened on this machine: files, model on meta, device, dtype, batch size."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from calibration.batch import Batch
from calibration.sources import Source as TextSource
from prune_cli.checkpoint.dtypes import FLOATS, SHORT_FLOATS, torch_dtype
from prune_cli.checkpoint.preflight import check_output
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import Source, resolve_model
from prune_cli.engine.activation_budget import ActivationBudget, Batching
from prune_cli.engine.texts import TextReader, check_seq_len
from prune_cli.errors import RequestError
from prune_cli.model.open_checkpoint import dequantised
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.text_only import text_only
from prune_cli.packed.dequantised import Dequantised
from prune_cli.packed.output import as_asked, keeps_packed
from prune_cli.preflight.models_and_texts import open_text
from prune_cli.ranks.ranks import ALONE, Ranks
from prune_cli.report.memory import MemoryPlan
from prune_cli.request.request import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, DEFAULT_SOURCE, PruneRequest
from prune_cli.sparse.dense_view import refuse_sparse

# Enough tokens a batch to keep the device busy; more only costs memory.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192, "mps": 4096}


@dataclass(frozen=True)
class OpenModel:
    """The model and the texts that a checked request names, on this machine.

    `calibration` is None where nothing needs a text. `ranks` are the processes that run it. `memory` is what it was
    fitted into, None where it is as usual; `warnings` are of what was settled so far.
    """

    request: PruneRequest
    source: Source
    checkpoint: Checkpoint
    model: StreamedModel
    device: torch.device
    dtype: torch.dtype
    calibration: TextSource | None
    evaluation: TextSource | None
    trust_remote_code: bool
    ranks: Ranks
    memory: MemoryPlan | None = field(default=None, kw_only=True)
    warnings: tuple[str, ...] = field(default=(), kw_only=True)

    def with_checkpoint(
        self, checkpoint: Checkpoint, config: Any | None = None, *, dtype: torch.dtype | None = None
    ) -> StreamedModel:
        """The same model over other weights, as those of the output; `config` where they have other shapes."""
        return StreamedModel(
            self.source.folder,
            checkpoint,
            dtype=dtype or self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            config=config,
        )

    def batch_size(self, windows: Batch) -> int:
        """How many of `windows` go through the model at once."""
        return pick_batch_size(self.request.batch_size, self.device, windows.length)

    @property
    def budget(self) -> ActivationBudget:
        """How many hidden states wait in memory."""
        return ActivationBudget.of(None if self.memory is None else self.memory.hidden_states)

    def batching(self, windows: Batch) -> Batching:
        """How `windows` pass the model where nothing is pruned."""
        return Batching(self.batch_size(windows), self.budget.together)

    def copies(self, tokens: int) -> int:
        """How many windows the dense model samples for each of those that hold `tokens`."""
        asked = self.request.self_calibration
        return 0 if asked == "auto" else asked

    def batches(self, windows: Batch) -> list[Batch]:
        return windows.split(self.batch_size(windows))


def open_model(request: PruneRequest, *, writes: bool = True, ranks: Ranks = ALONE) -> OpenModel:
    """What every way of pruning needs; raises RequestError (or PruneError when the hub fails).

    Without `writes`, no checkpoint will be written to OUT, and it is not looked at; of several `ranks` the first
    one writes.
    """
    given = DEFAULT_SOURCE if request.calibration is None else request.calibration
    calibration = open_text(given) if request.needs_text else None
    evaluation = open_text(request.eval) if request.eval is not None else None
    device = pick_device(request.device)
    source = resolve_model(request.model, request.revision)
    checkpoint = Checkpoint.open(source.folder)
    refuse_sparse(checkpoint)
    checkpoint = as_asked(dequantised(checkpoint), request.packed, default=_packed_by_default(request))
    if writes and ranks.first:
        check_output(request.out, checkpoint.folder, resume=request.resume, overwrite=request.overwrite)
    dtype = pick_dtype(request.dtype, device, checkpoint)
    trust = request.trust_remote_code
    model = StreamedModel(source.folder, checkpoint, dtype=dtype, device=device, trust_remote_code=trust)
    if request.text_only:
        if keeps_packed(checkpoint):
            raise RequestError("--text-only writes other tensors than the packed ones: add --packed bf16.")
        source, checkpoint = text_only(source, model)
        model = StreamedModel(source.folder, checkpoint, dtype=dtype, device=device, trust_remote_code=trust)
    if calibration is not None or evaluation is not None:
        check_seq_len(model, request.seq_len)
    return OpenModel(request, source, checkpoint, model, device, dtype, calibration, evaluation, trust, ranks)


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
    options = request.structured_options()
    if getattr(options, "after", "nothing") != "nothing":
        return True
    return "refit" in request.options and bool(getattr(options, "fits", False))


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
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RequestError("--device is mps, but torch sees no Metal device here: use auto or cpu.")
    return device


def pick_dtype(asked: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the forward pass: float32 on a CPU, elsewhere what most of the checkpoint is stored in."""
    if asked != "auto":
        return getattr(torch, asked)
    if device.type == "cpu":
        return torch.float32
    weights: Counter[str] = Counter()
    plain = checkpoint.as_half() if isinstance(checkpoint, Dequantised) else checkpoint
    for entry in plain.entries.values():
        if entry.dtype in FLOATS:
            weights[entry.dtype] += entry.count
    most = weights.most_common(1)[0][0] if weights else "F32"
    return torch_dtype(most) if most in SHORT_FLOATS else torch.float32


def pick_batch_size(asked: int | Literal["auto"], device: torch.device, seq_len: int) -> int:
    return asked if asked != "auto" else max(1, _BATCH_TOKENS.get(device.type, 2048) // seq_len)


def usual_length(opened: OpenModel) -> int:
    """Tokens of a window of plain text."""
    return opened.request.seq_len or min(DEFAULT_SEQ_LEN, opened.model.position_limit or DEFAULT_SEQ_LEN)


def given_tokens(opened: OpenModel) -> int | None:
    """Samples x length of the calibration text as far as it can be told unread; stored tokens are counted."""
    if opened.calibration is None:
        return None
    request = opened.request
    if opened.calibration.kind == "tokens":
        reader = TextReader(opened.model, None, request.seq_len, request.seed)
        return reader.read(opened.calibration, "calibration", request.samples).windows.tokens
    return (request.samples or DEFAULT_SAMPLES) * usual_length(opened)
