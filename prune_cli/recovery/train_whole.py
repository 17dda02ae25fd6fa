"""An end-to-end recovery: the teacher is asked once, then the whole pruned model is trained on its answers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from calibration.token_set import sha256_of
from prune_cli.checkpoint.block_tensors import BlockTensors
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.recovery.end_to_end import Course, EndToEnd, remove_state
from prune_cli.recovery.match_blocks import Samples
from prune_cli.recovery.prepare import RecoveryPlan, RecoveryTexts
from prune_cli.recovery.report import TrainingLook, TrainingRun
from prune_cli.recovery.request import RecoverRequest
from prune_cli.recovery.teacher_store import Stored, StoreMaker, TeacherStore
from prune_cli.recovery.trained_block import as_stored, trainable
from prune_cli.recovery.trained_weights import names_to_train, weights_of

_OWN_STORE = "teacher"


def train_whole(
    plan: RecoveryPlan,
    texts: RecoveryTexts,
    output: OutputFolder,
    progress: Progress,
    teacher_files: Mapping[str, str],
) -> TrainingRun:
    """Train, and write the best that came of it to `output`. Raises as `StoreMaker.make` and `EndToEnd.run` do."""
    request, model = plan.request, plan.model
    stored = _stored(plan)
    store = _ask_teacher(plan, texts, output, stored, teacher_files, progress)
    samples = texts.samples(request.batch_size)
    names = names_to_train(model, request)
    with _loaded(model), trainable(model, names) as parameters:
        training = EndToEnd(
            model=model,
            weights=weights_of(request, parameters),
            samples=samples,
            store=store,
            behind=stored.behind,
            course=_course(request, samples),
            folder=output.partial,
            stored=partial(_as_stored, model, names, parameters),
            progress=progress,
        )
        done, best = training.run()
    _write(model, best, output)
    return TrainingRun(
        steps=training.course.steps,
        best_step=done.best,
        ended=cast(Any, done.ended),
        looks=[TrainingLook(**asdict(look)) for look in done.looks],
        teacher_bytes=stored.bytes_of_a_token,
        seconds=done.seconds,
    )


def clear(output: OutputFolder) -> None:
    """Take away what only a resumed run needs, once all else is written."""
    remove_state(output.partial)
    if (output.partial / _OWN_STORE).exists():
        shutil.rmtree(output.partial / _OWN_STORE)


def _stored(plan: RecoveryPlan) -> Stored:
    """Hidden states take much room, so they are kept only where they are asked for."""
    request, teacher = plan.request, plan.pair.teacher
    behind = tuple(run[-1] for run in plan.pair.runs) if request.weights["square_head"] else ()
    return Stored(min(request.known_tokens, teacher.vocab_size - 1), teacher.vocab_size, teacher.hidden_size, behind)


def _ask_teacher(
    plan: RecoveryPlan,
    texts: RecoveryTexts,
    output: OutputFolder,
    stored: Stored,
    teacher_files: Mapping[str, str],
    progress: Progress,
) -> TeacherStore:
    windows, request = texts.windows, plan.request
    identity = {
        "teacher": dict(teacher_files),
        "text": sha256_of(windows),
        "stored": asdict(stored),
        "dtype": str(plan.dtype),
    }
    folder = output.partial / _OWN_STORE if request.store is None else Path(request.store).expanduser()
    maker = StoreMaker(plan.pair.teacher, stored, folder, identity, plan.batch_size(windows))
    return maker.make(windows, progress)


def _course(request: RecoverRequest, samples: Samples) -> Course:
    fitted = sum(batch.tokens for batch in samples.fit)
    passes = request.passes if request.tokens is None else request.tokens / fitted
    steps = max(1, math.ceil(passes * len(samples.fit)))
    return Course(
        steps=steps,
        every=request.looks_every(steps),
        rate=request.learning_rate,
        **request.weights,
        seed=request.seed,
        recompute=request.gradient_checkpointing,
    )


@contextmanager
def _loaded(model: StreamedModel) -> Iterator[None]:
    """All of the model's weights in memory."""
    model.load_outside()
    for block in range(len(model.blocks)):
        model.load_block(block, model.checkpoint)
    try:
        yield
    finally:
        for block in range(len(model.blocks)):
            model.unload_block(block)
        model.unload_embeddings()


def _as_stored(
    model: StreamedModel, names: Sequence[str], parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    return as_stored(model, BlockTensors(model.checkpoint, names), parameters)


def _write(model: StreamedModel, best: Mapping[str, torch.Tensor], output: OutputFolder) -> None:
    """Block by block, as a block that was matched; where nothing was better, all is there already."""
    checkpoint = model.checkpoint
    for block in range(len(model.blocks)):
        if best and block not in output.done:
            names = [name for name in model.block_names(block) if name in best]
            output.write_block(block, {checkpoint.stored_name(n): checkpoint.to_file(n, best[n]) for n in names}, {})
    output.wait()
