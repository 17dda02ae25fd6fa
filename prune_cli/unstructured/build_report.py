"""Gathers what a run knows at its end into the report, and what identifies a run into its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from calibration.tokens import TokenSet
from methods._pattern import NofM
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.input_statistics import sketch_rows
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.provenance import (
    batch_size_of,
    environment,
    measured,
    model_facts,
    text_report,
    versions,
    warnings_of,
    zeros_in,
)
from prune_cli.packed.dequantised import Dequantised
from prune_cli.packed.output import describe
from prune_cli.report.gains import gain_of_sparse_files, gain_of_zeros
from prune_cli.report.provenance import now, tool_facts
from prune_cli.report.types import (
    SCHEMA_VERSION,
    AllocationReport,
    BlockReport,
    Evaluation,
    MethodReport,
    Output,
    Report,
    TensorReport,
    Totals,
)
from prune_cli.request.allocation import Allocation
from prune_cli.request.request import PruneRequest
from prune_cli.sparse.saved_bytes import saved_bytes
from prune_cli.unstructured.plan import Decision, n_of_m
from prune_cli.unstructured.prepare import PruningPlan

_UNREACHED = "no calibration input reached it (the model may use this weight without calling its module)"


def fingerprint(
    request: PruneRequest, job: PruningPlan, calibration: TokenSet | None, evaluation: TokenSet | None
) -> dict[str, Any]:
    """All that the bytes of the output depend on, but for the input's files, which are hashed on the way."""
    names = "\n".join(job.pruned_names())
    return {
        "pipeline": str(job.pipeline),
        "options": job.pipeline.options_as_json(),
        "pattern": str(job.pattern),
        "allocate": [request.allocate, asdict(request.allocation_options()), job.allocation_file],
        "seed": request.seed,
        "format": request.format,
        "self_contained": request.self_contained,
        "packed": describe(job.checkpoint),
        "calibrate_by": request.calibrate_by,
        "target": request.target,
        "self_calibration": request.self_calibration,
        "pruned tensors": hashlib.sha256(names.encode()).hexdigest(),
        "calibration": calibration.sha256 if calibration else None,
        "batch_size": batch_size_of(request, job, calibration),
        "eval": evaluation.sha256 if evaluation else None,
        "device": job.device.type,
        "dtype": str(job.dtype),
        "versions": versions(),
    }


def assemble_report(
    request: PruneRequest,
    job: PruningPlan,
    allocation: Allocation,
    output: OutputFolder,
    calibration: TokenSet | None,
    evaluation: TokenSet | None,
    before: Evaluation | None,
    after: Evaluation | None,
    memory: PeakMemory,
    seconds: float,
) -> Report:
    """The report of a finished run; sparsities are counted in the written files."""
    written = output.checkpoint()
    errors = {name: error for line in output.done.values() for name, error in line["output_errors"].items()}
    notes = {name: tuple(texts) for line in output.done.values() for name, texts in line["notes"].items()}
    unreached = {name for line in output.done.values() for name in line["unreached"]}
    kept = [f"{name} was kept: {_UNREACHED}." for name in sorted(unreached)]
    decisions = [
        replace(d, prune=False, reason=_UNREACHED) if d.name in unreached else d for d in job.decisions.values()
    ]
    with ThreadPoolExecutor(max_workers=1) as background:
        hashes = background.submit(output.hashes)
        zeros = {name: zeros_in(written, name) for name in job.decisions}
    tensors = [
        _tensor_report(job, allocation, d, zeros[d.name], errors.get(d.name), notes.get(d.name, ())) for d in decisions
    ]
    return Report(
        schema_version=SCHEMA_VERSION,
        tool=tool_facts(),
        created=now(),
        request=request,
        environment=environment(job, batch_size_of(request, job, calibration)),
        model=model_facts(job, output),
        output=Output(str(request.out), hashes.result()),
        method=_method(job),
        allocation=AllocationReport(**allocation.to_dict()),
        calibration=text_report(calibration) if calibration else None,
        output_error_rows=sketch_rows(calibration.windows.tokens) if calibration else None,
        evaluation=measured(evaluation, before, after),
        totals=_totals(decisions, n_of_m(job.pattern), zeros, written, job.checkpoint.nbytes),
        structure=None,
        gain=gain_of_zeros(n_of_m(job.pattern)),
        blocks=[
            BlockReport(group, line["seconds"], group in output.resumed) for group, line in sorted(output.done.items())
        ],
        tensors=tensors,
        seconds=seconds,
        peak_host_bytes=memory.host_bytes,
        peak_device_bytes=memory.device_bytes,
        warnings=warnings_of(output, calibration, evaluation, *kept),
    )


def _method(job: PruningPlan) -> MethodReport:
    pipeline = job.pipeline
    return MethodReport(
        name=str(pipeline),
        summary=pipeline.method.summary,
        papers=[pipeline.method.paper, *(step.step.paper for step in pipeline.steps)],
        options=pipeline.options_as_json(),
    )


def _tensor_report(
    job: PruningPlan,
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
        pattern=None if asked is None else str(n_of_m(job.pattern) or f"{asked:g}"),
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


def of_sparse_files(report: Report, job: PruningPlan, output: OutputFolder, nbytes: int) -> Report:
    """The report of dense files once they were encoded to `nbytes` in all."""
    dense = report.totals.bytes_after
    return replace(
        report,
        output=replace(report.output, files=output.hashes(), dense_files=report.output.files),
        totals=replace(report.totals, bytes_after=nbytes, bytes_as_sparse=None),
        gain=gain_of_sparse_files(n_of_m(job.pattern), dense, nbytes),
    )
