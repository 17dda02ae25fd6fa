"""Gathers what a recovery knows at its end into the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from methods._block_matching import Matched
from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.file_names import REPORT_JSON, why_not_copied
from prune_cli.checkpoint.inputs import told_change
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.provenance import environment, model_facts, text_report
from prune_cli.errors import PruneError
from prune_cli.packed.output import describe
from prune_cli.recovery.prepare import RecoveryPlan, RecoveryTexts
from prune_cli.recovery.report import (
    SCHEMA_VERSION,
    FittedText,
    Losses,
    RecoveredTensor,
    RecoveryReport,
    TrainingRun,
)
from prune_cli.recovery.trained_weights import names_to_train, why_not_trained
from prune_cli.report.provenance import now, tool_facts
from prune_cli.report.read import read_report
from prune_cli.report.types import BlockRecovery, Output, PrunedModel


@dataclass(frozen=True)
class Done:
    """What a run has when all is written."""

    output: OutputFolder
    memory: PeakMemory
    losses: Losses
    training: TrainingRun | None
    teacher_files: Mapping[str, str]
    seconds: float


def assemble_report(plan: RecoveryPlan, texts: RecoveryTexts, done: Done) -> RecoveryReport:
    """The report of a finished run. Raises PruneError where a tensor has not the zeros that it had."""
    blocks = [] if plan.request.end_to_end else block_recoveries(plan.pair.runs, done.output)
    tensors = _tensors(plan, done.output.checkpoint())
    copies = 0 if texts.sampled is None else len(texts.sampled)
    return RecoveryReport(
        schema_version=SCHEMA_VERSION,
        tool=tool_facts(),
        created=now(),
        request=plan.request,
        environment=environment(plan, plan.batch_size(texts.calibration.windows)),
        model=model_facts(plan, done.output.input_hashes),
        teacher=PrunedModel(
            given=plan.teacher_source.given,
            revision=plan.teacher_source.revision,
            architecture=type(plan.pair.teacher.model).__name__,
            files=done.teacher_files,
        ),
        output=Output(str(plan.request.out), done.output.hashes()),
        calibration=FittedText(text_report(texts.calibration), texts.held_out, copies),
        losses=done.losses,
        parameters=sum(entry.count for entry in plan.checkpoint.entries.values()),
        trained_parameters=sum(plan.checkpoint.entries[t.name].count for t in tensors if t.action == "trained"),
        zeros=sum(tensor.zeros or 0 for tensor in tensors),
        blocks=blocks,
        training=done.training,
        tensors=tensors,
        seconds=done.seconds,
        peak_host_bytes=done.memory.host_bytes,
        peak_device_bytes=done.memory.device_bytes,
        warnings=[*texts.warnings, *_warnings(plan, done, blocks)],
    )


def block_recoveries(runs: Sequence[tuple[int, ...]], output: OutputFolder) -> list[BlockRecovery]:
    """What was journaled of every block that was matched; `runs` as in `Pair`."""
    found = []
    for block, run in enumerate(runs):
        line = output.done.get(block, {})
        if "matched" not in line:
            continue
        matched = Matched(**line["matched"])
        found.append(
            BlockRecovery(
                block=block,
                teacher_blocks=run,
                error_before=matched.before,
                error_after=matched.after,
                epochs=tuple(matched.epochs),
                best_epoch=matched.best,
                seconds=line["seconds"],
                resumed=block in output.resumed,
            )
        )
    return found


def _warnings(plan: RecoveryPlan, done: Done, blocks: list[BlockRecovery]) -> list[str]:
    asked = plan.request.passes
    short = [str(block.block) for block in blocks if len(block.epochs) < asked]
    packed = describe(plan.checkpoint)
    left = [why_not_copied(file) for file in done.output.not_copied]
    if short:
        left.append(
            f"The training of block(s) {', '.join(short)} ended in NaN; what was best before that was kept: "
            "give a smaller --rate."
        )
    if done.training is not None and done.training.ended == "nan":
        left.append(
            f"The training ended in NaN behind step {done.training.looks[-1].step}; what was best before that was "
            "kept: give a smaller --rate."
        )
    return [*_other_teacher(plan, done.teacher_files), *left, *([packed] if packed else [])]


def _other_teacher(plan: RecoveryPlan, files: Mapping[str, str]) -> list[str]:
    """Where the pruned model has a report, whether its teacher has the weights that were pruned."""
    if not (plan.source.folder / REPORT_JSON).is_file():
        return []
    pruned = read_report(plan.source.folder).report.model.files
    changed = told_change(REPORT_JSON, pruned, files)
    return [f"{changed}; the teacher {plan.request.teacher} is not the model that was pruned."] if changed else []


def _tensors(plan: RecoveryPlan, written: Checkpoint) -> list[RecoveredTensor]:
    trained = set(names_to_train(plan.model, plan.request))
    return [
        RecoveredTensor(
            name=name,
            role=info.role,
            block=info.block,
            shape=info.entry.shape,
            dtype=info.entry.dtype,
            action="trained" if name in trained else "kept",
            reason="" if name in trained else why_not_trained(plan.model, plan.request, name),
            zeros=_same_zeros(plan.checkpoint, written, name),
        )
        for name, info in plan.model.tensor_map.items()
    ]


def _same_zeros(before: Checkpoint, after: Checkpoint, name: str) -> int | None:
    """How many there are; None for storage formats whose zeros cannot be counted."""
    if before.entries[name].dtype not in FLOATS:
        return None
    zeros = before.read(name) == 0
    if not torch.equal(zeros, after.read(name) == 0):
        raise PruneError(f"{name} does not have the zeros any more that it had: please report it.")
    return int(zeros.count_nonzero())
