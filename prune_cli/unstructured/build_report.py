"""Gathers what a run knows at its end into the report, and what identifies a run into its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from methods._pattern import NofM
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.input_statistics import sketch_rows
from prune_cli.engine.inputs import all_inputs
from prune_cli.engine.not_loaded import not_loaded
from prune_cli.engine.provenance import (
    batch_size_of,
    environment,
    model_facts,
    text_report,
    versions,
    warnings_of,
    zeros_in,
)
from prune_cli.engine.residual_drift import DENSE_TARGET_PAPER
from prune_cli.engine.run_context import Run
from prune_cli.engine.self_calibration import SELF_CALIBRATION_PAPER
from prune_cli.engine.texts import Texts
from prune_cli.packed.dequantised import Dequantised
from prune_cli.packed.output import describe
from prune_cli.recovery.build_report import block_recoveries
from prune_cli.recovery.trained_block import all_trained
from prune_cli.report.gains import gain_of_sparse_files, gain_of_zeros
from prune_cli.report.provenance import now, tool_facts
from prune_cli.report.types import (
    SCHEMA_VERSION,
    AllocationReport,
    BlockReport,
    EvaluationReport,
    MethodReport,
    NotLoaded,
    Output,
    Report,
    TensorReport,
    Totals,
)
from prune_cli.request.allocation import STRATEGIES, Allocation
from prune_cli.sparse.saved_bytes import saved_bytes
from prune_cli.unstructured.plan import Decision, n_of_m
from prune_cli.unstructured.prepare import PruningPlan

_TRAINED = "trained with its block (--match-blocks)"
_UNREACHED = "no calibration input reached it (the model may use this weight without calling its module)"


def fingerprint(plan: PruningPlan, texts: Texts) -> dict[str, Any]:
    """All that the bytes of the output depend on, but for the input's files, which are hashed on the way."""
    names = "\n".join(plan.pruned_names())
    request = plan.request
    return {
        "pipeline": str(plan.pipeline),
        "options": plan.pipeline.options_as_json(),
        "pattern": str(plan.pattern),
        "allocate": [request.allocation, asdict(request.allocation_options()), plan.allocation_file],
        "seed": request.seed,
        "format": request.format,
        "self_contained": request.self_contained,
        "packed": describe(plan.checkpoint),
        "text_only": request.text_only,
        "calibrate_by": request.calibrate_by,
        "target": request.target,
        "self_calibration": texts.calibration.copies if texts.calibration else 0,
        "match_blocks": request.match_blocks,
        "pruned tensors": hashlib.sha256(names.encode()).hexdigest(),
        "calibration": texts.calibration.sha256 if texts.calibration else None,
        "batch_size": batch_size_of(plan, texts.calibration),
        "eval": texts.evaluation.sha256 if texts.evaluation else None,
        "device": plan.device.type,
        "dtype": str(plan.dtype),
        "versions": versions(),
    }


def assemble_report(
    run: Run[PruningPlan], allocation: Allocation, evaluation: EvaluationReport | None, seconds: float
) -> Report:
    """The report of a finished run; sparsities are counted in the written files."""
    plan, output, calibration = run.plan, run.output, run.texts.calibration
    written = output.checkpoint()
    errors = {name: error for line in output.done.values() for name, error in line["output_errors"].items()}
    notes = {name: tuple(texts) for line in output.done.values() for name, texts in line["notes"].items()}
    unreached = {name for line in output.done.values() for name in line["unreached"]}
    kept = [f"{name} was kept: {_UNREACHED}." for name in sorted(unreached)]
    decisions = [
        replace(d, prune=False, reason=_UNREACHED) if d.name in unreached else d for d in plan.decisions.values()
    ]
    with ThreadPoolExecutor(max_workers=1) as background:
        hashes = background.submit(output.hashes)
        zeros = {name: zeros_in(written, name) for name in plan.decisions}
    tensors = [
        replace(
            _tensor_report(plan, allocation, d, zeros[d.name], errors.get(d.name), notes.get(d.name, ())),
            dtype=written.stored_dtype(d.name),
        )
        for d in decisions
    ]
    sampled = calibration.sampled if calibration else 0
    trained = all_trained(plan.model) if run.request.match_blocks else set()
    tensors = [
        replace(each, action="refitted", reason=_TRAINED) if each.action == "kept" and each.name in trained else each
        for each in tensors
    ]
    return Report(
        schema_version=SCHEMA_VERSION,
        tool=tool_facts(),
        created=now(),
        request=run.request,
        environment=environment(plan, batch_size_of(plan, calibration)),
        model=model_facts(plan, output.input_hashes),
        inputs=all_inputs(run),
        output=Output(str(run.request.out), hashes.result()),
        method=_method(plan, sampled),
        allocation=AllocationReport(**allocation.to_dict()),
        calibration=text_report(calibration) if calibration else None,
        sampled=sampled,
        output_error_rows=sketch_rows(calibration.windows.tokens) if calibration else None,
        evaluation=evaluation,
        totals=_totals(decisions, n_of_m(plan.pattern), zeros, written, plan.checkpoint.nbytes),
        structure=None,
        gain=gain_of_zeros(n_of_m(plan.pattern)),
        blocks=[
            BlockReport(group, line["seconds"], group in output.resumed) for group, line in sorted(output.done.items())
        ],
        matched=block_recoveries(_alone(plan), output) if run.request.match_blocks else (),
        tensors=tensors,
        seconds=seconds,
        peak_host_bytes=run.memory.host_bytes,
        peak_device_bytes=run.memory.device_bytes,
        memory=plan.memory,
        warnings=warnings_of(run, *kept),
        not_loaded=what_is_not_loaded(plan),
    )


def what_is_not_loaded(plan: PruningPlan) -> tuple[NotLoaded, ...]:
    """Extra heads and other tensors without a parameter; what a run makes of them."""

    def became(names: Sequence[str]) -> str:
        pruned = sum(plan.decisions[name].prune for name in names)
        return f"{pruned} of its tensors pruned, as --include asks" if pruned else "kept as it was"

    return not_loaded(plan.model.tensor_map, plan.checkpoint, became)


def _alone(plan: PruningPlan) -> list[tuple[int, ...]]:
    """Every block is its own counterpart."""
    return [(block,) for block in range(len(plan.model.blocks))]


def _method(plan: PruningPlan, sampled: int) -> MethodReport:
    pipeline = plan.pipeline
    return MethodReport(
        name=str(pipeline),
        summary=_told(plan, sampled),
        papers=list(dict.fromkeys(_papers(plan, sampled))),
        options=pipeline.options_as_json(),
    )


def _told(plan: PruningPlan, sampled: int) -> str:
    """What method, steps and settings do, without a full stop."""
    request, pipeline = plan.request, plan.pipeline
    parts = [pipeline.method.summary, *(step.step.summary for step in pipeline.steps)]
    if request.target == "dense":
        parts.append("what is solved for follows the outputs of the dense model")
    if sampled:
        parts.append("the dense model sampled calibration text of its own beside the given one")
    return "; ".join(parts)


def _papers(plan: PruningPlan, sampled: int) -> Iterator[str]:
    """Of the method and of every part beside it."""
    request = plan.request
    yield plan.pipeline.method.paper
    yield from (step.step.paper for step in plan.pipeline.steps)
    if request.allocation in STRATEGIES and request.allocation != "uniform":
        yield STRATEGIES[request.allocation].paper
    if request.target == "dense":
        yield DENSE_TARGET_PAPER
    if sampled:
        yield SELF_CALIBRATION_PAPER


def _tensor_report(
    plan: PruningPlan,
    allocation: Allocation,
    decision: Decision,
    zeros: int | None,
    error: float | None,
    notes: tuple[str, ...],
) -> TensorReport:
    entry = decision.info.entry
    asked = allocation.sparsity[entry.name] if decision.prune else None
    return TensorReport(
        name=entry.name,
        role=decision.info.role,
        block=decision.info.block,
        shape=entry.shape,
        dtype=entry.dtype,
        action="pruned" if decision.prune else "kept",
        reason=decision.reason,
        pattern=None if asked is None else str(n_of_m(plan.pattern) or f"{asked:g}"),
        asked_sparsity=asked,
        sparsity=None if zeros is None or not entry.count else zeros / entry.count,
        output_error=error,
        notes=notes,
    )


def _totals(
    decisions: Sequence[Decision],
    pattern: NofM | None,
    zeros: dict[str, int | None],
    written: Checkpoint,
    bytes_before: int,
) -> Totals:
    pruned = [decision.info.entry for decision in decisions if decision.prune]
    parameters = sum(entry.count for entry in written.entries.values())
    pruned_parameters = sum(entry.count for entry in pruned)
    zeros_in_pruned = sum(zeros[entry.name] or 0 for entry in pruned)
    return Totals(
        parameters=parameters,
        pruned_parameters=pruned_parameters,
        zeros_in_pruned=zeros_in_pruned,
        sparsity_of_pruned=zeros_in_pruned / pruned_parameters if pruned_parameters else 0.0,
        sparsity_of_model=sum(count or 0 for count in zeros.values()) / parameters,
        bytes_before=bytes_before,
        bytes_after=written.nbytes,
        bytes_as_sparse=None
        if isinstance(written, Dequantised)
        else written.nbytes
        - sum(saved_bytes(written.entries[d.name], zeros[d.name], pattern if d.prune else None) for d in decisions),
    )


def of_sparse_files(report: Report, plan: PruningPlan, output: OutputFolder, nbytes: int) -> Report:
    """The report of dense files once they were encoded to `nbytes` in all."""
    dense = report.totals.bytes_after
    return replace(
        report,
        output=replace(report.output, files=output.hashes(), dense_files=report.output.files),
        totals=replace(report.totals, bytes_after=nbytes, bytes_as_sparse=None),
        gain=gain_of_sparse_files(n_of_m(plan.pattern), dense, nbytes),
    )
