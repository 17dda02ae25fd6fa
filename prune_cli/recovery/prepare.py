"""Everything that is settled before any weight is touched: both models, whether they fit, the texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from calibration.batch import Batch, joined
from calibration.sources import Source as TextSource
from calibration.token_set import TokenSet
from prune_cli.checkpoint.preflight import check_output, check_space
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import Source, resolve_model
from prune_cli.engine.activation_budget import Batching
from prune_cli.engine.open_model import pick_batch_size, pick_device, pick_dtype
from prune_cli.engine.self_calibration import self_calibrated
from prune_cli.engine.texts import TextReader, check_seq_len, read_evaluation
from prune_cli.errors import RequestError
from prune_cli.model.architecture import load_tokenizer
from prune_cli.model.open_checkpoint import dequantised, open_checkpoint
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.packed.output import as_asked, output_bytes
from prune_cli.preflight.models_and_texts import open_text
from prune_cli.progress import Progress
from prune_cli.recovery.counterparts import counterparts
from prune_cli.recovery.match_blocks import Pair, Samples, held_out_of, samples_per_step
from prune_cli.recovery.request import RecoverRequest
from prune_cli.recovery.trained_weights import names_to_train
from prune_cli.request.request import DEFAULT_SOURCE
from prune_cli.sparse.dense_view import refuse_sparse

# Three models are measured on so many windows where nobody said.
_EVAL_WINDOWS = 256
# Of a weight in a saved state: as a checkpoint stores it, and in float32 with two moments.
_BEST_BYTES, _OPTIMISED_BYTES = 2, 12


@dataclass(frozen=True)
class RecoveryPlan:
    """What a checked request names, on this machine; `model` is the pruned one."""

    request: RecoverRequest
    source: Source
    checkpoint: Checkpoint
    model: StreamedModel
    teacher_source: Source
    pair: Pair
    device: torch.device
    dtype: torch.dtype
    calibration: TextSource
    evaluation: TextSource

    def batch_size(self, windows: Batch) -> int:
        """Of windows that are only read."""
        return pick_batch_size(self.request.batch_size, self.device, windows.length)

    def with_checkpoint(self, checkpoint: Checkpoint) -> StreamedModel:
        """The pruned model over other weights, as those of the output."""
        return _model(self.request, self.source, checkpoint, self.device, self.dtype)


@dataclass(frozen=True)
class RecoveryTexts:
    """`calibration` as it was read; of its samples the last `held_out` are not fitted. `sampled` by the teacher."""

    calibration: TokenSet
    held_out: int
    sampled: Batch | None
    evaluation: TokenSet

    def samples(self, asked: int | Literal["auto"]) -> Samples:
        """In batches of one step."""
        windows = self.calibration.windows
        size = samples_per_step(asked, windows.length)
        fit, held_out = windows[: -self.held_out], windows[-self.held_out :]
        sampled = [] if self.sampled is None else self.sampled.split(size)
        return Samples([*fit.split(size), *sampled], held_out.split(size))

    @property
    def windows(self) -> Batch:
        """All in the order of `samples`: those that are fitted, sampled, and held out."""
        windows = self.calibration.windows
        fit, held_out = windows[: -self.held_out], windows[-self.held_out :]
        return joined([fit, *([] if self.sampled is None else [self.sampled]), held_out])

    @property
    def warnings(self) -> list[str]:
        """Those of both texts, and where they may be one."""
        found = [*self.calibration.warnings, *self.evaluation.warnings]
        seen = {row.numpy().tobytes() for row in self.calibration.ids}
        again = sum(row.numpy().tobytes() in seen for row in self.evaluation.ids)
        if again:
            found.append(
                f"{again} of the {len(self.evaluation.ids)} windows of {self.evaluation.source} were also fitted, so "
                "their loss says too little: give another text to --eval."
            )
        return found


def prepare(request: RecoverRequest) -> RecoveryPlan:
    """Check all that can be checked without weights. Raises RequestError (or PruneError when the hub fails)."""
    request.check()
    calibration = open_text(DEFAULT_SOURCE if request.calibration is None else request.calibration)
    evaluation = open_text(DEFAULT_SOURCE if request.eval is None else request.eval)
    device = pick_device(request.device)
    source = resolve_model(request.model, request.revision)
    teacher_source = resolve_model(request.teacher, None)
    checkpoint = Checkpoint.open(source.folder)
    refuse_sparse(checkpoint)
    checkpoint = as_asked(dequantised(checkpoint), None, default="bf16")
    check_output(request.out, checkpoint.folder, resume=request.resume, overwrite=request.overwrite)
    check_output(request.out, teacher_source.folder, resume=request.resume, overwrite=True)
    dtype = pick_dtype(request.dtype, device, checkpoint)
    model = _model(request, source, checkpoint, device, dtype)
    teacher = _model(request, teacher_source, open_checkpoint(teacher_source.folder), device, dtype)
    _check_fit(request, model, teacher)
    _check_tokenizers(request, source, teacher_source)
    check_seq_len(model, request.seq_len)
    if not names_to_train(model, request):
        raise RequestError(
            f"{request.model} has no {' or '.join(request.parts)} in its blocks that can be trained: give another "
            + ("--how." if request.how == "router" else "--train.")
        )
    check_space(request.out, output_bytes(checkpoint) + _state_bytes(request, model))
    pair = Pair(model, teacher, counterparts(model, teacher))
    return RecoveryPlan(
        request, source, checkpoint, model, teacher_source, pair, device, dtype, calibration, evaluation
    )


def _state_bytes(request: RecoverRequest, model: StreamedModel) -> int:
    """Of what a training saves to go on from: every weight with its moments, and the best so far."""
    if not request.end_to_end:
        return 0
    trained = sum(model.checkpoint.entries[name].count for name in names_to_train(model, request))
    return trained * (_BEST_BYTES if request.how == "lora" else _BEST_BYTES + _OPTIMISED_BYTES)


def _model(
    request: RecoverRequest, source: Source, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> StreamedModel:
    trust = request.trust_remote_code
    return StreamedModel(source.folder, checkpoint, dtype=dtype, device=device, trust_remote_code=trust)


def _check_fit(request: RecoverRequest, model: StreamedModel, teacher: StreamedModel) -> None:
    """Raise RequestError for a teacher whose hidden states cannot be those to reach."""
    wrong = "give the dense model that it was made from to --teacher."
    names = f"{request.model} and the teacher {request.teacher}"
    for what, ours, theirs in (
        ("entries in the vocabulary", model.vocab_size, teacher.vocab_size),
        ("as hidden size", model.hidden_size, teacher.hidden_size),
    ):
        if ours != theirs:
            raise RequestError(f"{names} have {ours} and {theirs} {what}: {wrong}")
    if len(teacher.blocks) < len(model.blocks):
        raise RequestError(
            f"The teacher {request.teacher} has {len(teacher.blocks)} blocks, fewer than the {len(model.blocks)} of "
            f"{request.model}: {wrong}"
        )


def _check_tokenizers(request: RecoverRequest, source: Source, teacher: Source) -> None:
    ours, theirs = (load_tokenizer(each.folder, request.trust_remote_code) for each in (source, teacher))
    if ours is None or theirs is None:
        return
    mine, other = ours.get_vocab(), theirs.get_vocab()
    differ = [token for token in mine if other.get(token) != mine[token]]
    if differ:
        raise RequestError(
            f"The tokenizers of {request.model} and of the teacher {request.teacher} differ (in {len(differ)} tokens, "
            f"as {differ[0]!r}): give the dense model that it was made from to --teacher."
        )


def read_texts(plan: RecoveryPlan, progress: Progress) -> RecoveryTexts:
    """The windows to fit, to hold out and to judge by. Raises RequestError for too little text."""
    progress.stage("Reading text", 1)
    request = plan.request
    tokenizer = load_tokenizer(plan.source.folder, plan.request.trust_remote_code)
    reader = TextReader(plan.model, tokenizer, request.seq_len, request.seed)
    calibration = reader.read(plan.calibration, "calibration", request.samples)
    if len(calibration.windows) < 2:
        raise RequestError(
            f"{calibration.source} gives one sample, but a recovery needs at least 2, of which one is held out: give "
            "more text or a smaller --seq-len."
        )
    evaluation = read_evaluation(reader, plan.evaluation, request.eval_windows or _EVAL_WINDOWS)
    texts = RecoveryTexts(calibration, held_out_of(len(calibration.windows)), None, evaluation)
    for warning in texts.warnings:
        progress.say(f"warning: {warning}")
    return texts


def with_sampled(plan: RecoveryPlan, texts: RecoveryTexts, progress: Progress) -> RecoveryTexts:
    """More windows, that the teacher samples from those that are fitted; the same ones when the run is resumed."""
    fit, teacher = texts.calibration.windows[: -texts.held_out], plan.pair.teacher
    given = replace(texts.calibration, ids=fit.ids, mask=fit.mask, beside=fit.beside)
    batching, request = Batching(plan.batch_size(fit)), plan.request
    found = self_calibrated(given, request.self_calibration, teacher, batching, request.seed, progress)
    return replace(texts, sampled=found.windows[len(fit) :] if request.self_calibration else None)
