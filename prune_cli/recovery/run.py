"""The story of a recovery, top to bottom."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from prune_cli.checkpoint.output_folder import OutputFolder, hash_files
from prune_cli.engine.activation_budget import Batching
from prune_cli.engine.evaluate import PROTOCOL, evaluate
from prune_cli.engine.expected import copying_title
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.provenance import text_report, versions
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.packed.output import config_of_output, output_layout
from prune_cli.progress import Progress, Silent
from prune_cli.recovery.build_report import Done, assemble_report
from prune_cli.recovery.files import recovery_files
from prune_cli.recovery.match_blocks import Matching, match_blocks
from prune_cli.recovery.prepare import RecoveryPlan, RecoveryTexts, prepare, read_texts, with_sampled
from prune_cli.recovery.report import Losses, RecoveryReport, TrainingRun
from prune_cli.recovery.request import RecoverRequest
from prune_cli.recovery.stages import AFTER, BEFORE, TEACHER, stages_of
from prune_cli.recovery.train_whole import clear, train_whole
from prune_cli.report.types import Evaluation


@torch.no_grad()
def recover(request: RecoverRequest, progress: Progress | None = None) -> RecoveryReport:
    """Train what pruning left as `request` says and write OUT; returns the report that is written there too.

    Raises RequestError before any work where the request cannot be met, PruneError where the run fails. A run that was
    killed or interrupted continues with `resume=True` and writes the same bytes.
    """
    progress = progress or Silent()
    begun = time.monotonic()
    plan = prepare(request)
    with PeakMemory(plan.device) as memory:
        texts = read_texts(plan, progress)
        progress.expect(stages_of(plan, texts))
        teacher = plan.pair.teacher.checkpoint
        teacher_files = hash_files(teacher.folder, teacher.files)
        with OutputFolder(request.out, plan.checkpoint) as output:
            progress.stage(copying_title(plan.checkpoint), 1)
            asked = _fingerprint(plan, texts, teacher_files)
            output.begin(asked, output_layout(plan.checkpoint), resume=request.resume)
            dense = _evaluation(plan, texts, plan.pair.teacher, output, TEACHER, progress)
            before = _evaluation(plan, texts, plan.model, output, BEFORE, progress)
            texts = with_sampled(plan, texts, progress)
            training = _train(plan, texts, output, progress, teacher_files)
            after = _evaluation(plan, texts, plan.with_checkpoint(output.checkpoint()), output, AFTER, progress)
            output.copy_side_files()
            losses = Losses(text_report(texts.evaluation), PROTOCOL, dense, before, after)
            done = Done(output, memory, losses, training, teacher_files, time.monotonic() - begun)
            report = assemble_report(plan, texts, done)
            clear(output)
            output.commit(recovery_files(report, plan.source.folder), config_of_output(plan.checkpoint))
    return report


def _fingerprint(plan: RecoveryPlan, texts: RecoveryTexts, teacher_files: dict[str, str]) -> dict[str, Any]:
    """All that the bytes of the output depend on, but for the pruned model's files, which are hashed on the way."""
    request = plan.request
    return {
        "command": "recover",
        "how": request.how,
        "teacher": teacher_files,
        "epochs": request.passes,
        "rate": request.learning_rate,
        "seed": request.seed,
        "calibration": texts.calibration.sha256,
        "self_calibration": request.self_calibration,
        "eval": texts.evaluation.sha256,
        **_end_to_end_options(request),
        "batch_size": [len(batch) for batch in texts.samples(request.batch_size).fit],
        "device": plan.device.type,
        "dtype": str(plan.dtype),
        "versions": versions(),
    }


def _end_to_end_options(request: RecoverRequest) -> dict[str, Any]:
    if not request.end_to_end:
        return {}
    return {
        "tokens": request.tokens,
        **request.weights,
        "top_k": request.known_tokens,
        "every": request.every,
        **_moved(request),
    }


def _moved(request: RecoverRequest) -> dict[str, Any]:
    return {"train": request.parts, "rank": request.low_rank if request.how == "lora" else None}


def _train(
    plan: RecoveryPlan,
    texts: RecoveryTexts,
    output: OutputFolder,
    progress: Progress,
    teacher_files: dict[str, str],
) -> TrainingRun | None:
    """Train as was asked for and write what came of it; the story of an end-to-end training."""
    request = plan.request
    if request.end_to_end:
        return train_whole(plan, texts, output, progress, teacher_files)
    samples = texts.samples(request.batch_size)
    matching = Matching.of(request.passes, request.learning_rate, request.seed)
    match_blocks(plan.pair, samples, matching, output, progress)
    return None


def _evaluation(
    plan: RecoveryPlan,
    texts: RecoveryTexts,
    model: StreamedModel,
    output: OutputFolder,
    title: str,
    progress: Progress,
) -> Evaluation:
    """Measured once, also when the run is resumed."""
    if title in output.notes:
        return Evaluation(**output.notes[title])
    windows = texts.evaluation.windows
    progress.stage(title, len(model.blocks))
    found = evaluate(model, windows, Batching(plan.batch_size(windows)), progress)
    output.note(title, asdict(found))
    return found
