"""Gathers what a run knows at its end into the report, and what identifies a run into its fingerprint."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch

from calibration.tokens import TokenSet
from methods._pattern import NofM
from prune_cli import __version__
from prune_cli.allocation import Allocation
from prune_cli.checkpoint import FLOATS, Checkpoint
from prune_cli.evaluate import PROTOCOL, Evaluation
from prune_cli.input_statistics import sketch_rows
from prune_cli.memory import PeakMemory
from prune_cli.output import OutputFolder
from prune_cli.plan import Decision
from prune_cli.prepare import Opened, Prepared, pick_batch_size
from prune_cli.report import (
    SCHEMA_VERSION,
    BlockReport,
    EvaluationReport,
    Report,
    TensorReport,
    Totals,
    gain_of_sparse_files,
    gain_of_zeros,
    now,
    text_report,
)
from prune_cli.request import PruneRequest
from prune_cli.sparse.estimate import saved_bytes

_UNREACHED = "no calibration input reached it (the model may use this weight without calling its module)"


def fingerprint(
    request: PruneRequest, job: Prepared, calibration: TokenSet | None, evaluation: TokenSet | None
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


def batch_size_of(request: PruneRequest, job: Opened, tokens: TokenSet | None) -> int | None:
    return None if tokens is None else pick_batch_size(request.batch_size, job.device, tokens.ids.shape[1])


def versions() -> dict[str, str]:
    """Of what the bytes of an output depend on."""
    names = ("torch", "transformers", "safetensors")
    return {"prune-cli": __version__, **{name: version(name) for name in names}}


def assemble_report(
    request: PruneRequest,
    job: Prepared,
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
        request=request_as_json(request),
        environment=environment(job, batch_size_of(request, job, calibration)),
        model=model_facts(job, output),
        output={"folder": str(request.out), "files": hashes.result()},
        method=_method(job),
        allocation=allocation.to_dict(),
        calibration=text_report(calibration) if calibration else None,
        output_error_rows=sketch_rows(calibration.ids.numel()) if calibration else None,
        evaluation=measured(evaluation, before, after),
        totals=_totals(tensors, decisions, zeros, written, job.checkpoint.nbytes),
        structure=None,
        gain=gain_of_zeros(str(job.pattern)),
        blocks=[
            BlockReport(group, line["seconds"], group in output.resumed) for group, line in sorted(output.done.items())
        ],
        tensors=tensors,
        seconds=seconds,
        peak_host_bytes=memory.host_bytes,
        peak_device_bytes=memory.device_bytes,
        warnings=warnings_of(output, calibration, evaluation, *kept),
    )


def tool_facts() -> dict[str, str]:
    return {"name": "prune-cli", "version": __version__}


def model_facts(job: Opened, output: OutputFolder) -> dict[str, Any]:
    """What was pruned."""
    return {
        "given": job.source.given,
        "revision": job.source.revision,
        "architecture": type(job.model.model).__name__,
        "files": output.input_hashes,
    }


def measured(
    evaluation: TokenSet | None, before: Evaluation | None, after: Evaluation | None
) -> EvaluationReport | None:
    """The perplexities, where they were asked for."""
    if before is None or after is None or evaluation is None:
        return None
    return EvaluationReport(text_report(evaluation), PROTOCOL, before, after)


def warnings_of(
    output: OutputFolder, calibration: TokenSet | None, evaluation: TokenSet | None, *own: str
) -> list[str]:
    """Those of the texts, the run's `own`, and those of files that are not in the output."""
    warnings = [w for tokens in (calibration, evaluation) if tokens for w in tokens.warnings]
    left = [f"{file} was not copied: it holds weights that this run did not prune." for file in output.not_copied]
    return [*warnings, *own, *left]


def request_as_json(request: PruneRequest) -> dict[str, Any]:
    """Every field, as JSON has it."""
    return {
        **asdict(request),
        "out": str(request.out),
        "include": list(request.include),
        "exclude": list(request.exclude),
    }


def _method(job: Prepared) -> dict[str, Any]:
    pipeline = job.pipeline
    return {
        "name": str(pipeline),
        "summary": pipeline.method.summary,
        "papers": [pipeline.method.paper, *(step.step.paper for step in pipeline.steps)],
        "options": pipeline.options_as_json(),
    }


def environment(job: Opened, batch_size: int | None) -> dict[str, Any]:
    """Where a run ran."""
    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else str(job.device)
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "platform": platform.platform(),
        "device": device,
        "compute_dtype": str(job.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
    }


def zeros_in(written: Checkpoint, name: str) -> int | None:
    """None for storage formats whose zeros cannot be counted without decoding them."""
    if written.entries[name].dtype not in FLOATS:
        return None
    zeros = written.read(name) == 0
    return int(zeros.count_nonzero())


def _tensor_report(
    job: Prepared,
    allocation: Allocation,
    decision: Decision,
    zeros: int | None,
    error: float | None,
    notes: tuple[str, ...],
) -> TensorReport:
    entry = decision.place.entry
    asked = allocation.sparsity[entry.name] if decision.prune else None
    return TensorReport(
        name=entry.name,
        role=decision.place.role,
        block=decision.place.block,
        shape=entry.shape,
        dtype=entry.dtype,
        action="pruned" if decision.prune else "kept",
        reason=decision.reason,
        pattern=None if asked is None else str(job.pattern) if isinstance(job.pattern, NofM) else f"{asked:g}",
        asked_sparsity=asked,
        sparsity=None if zeros is None or not entry.count else zeros / entry.count,
        output_error=error,
        notes=notes,
    )


def _totals(
    tensors: Sequence[TensorReport],
    decisions: Sequence[Decision],
    zeros: dict[str, int | None],
    written: Checkpoint,
    bytes_before: int,
) -> Totals:
    pruned = [decision.place.entry for decision in decisions if decision.prune]
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
        bytes_as_sparse=written.nbytes
        - sum(saved_bytes(written.entries[t.name], zeros[t.name], t.pattern) for t in tensors),
    )


def of_sparse_files(report: Report, job: Prepared, output: OutputFolder, nbytes: int) -> Report:
    """The report of dense files once they were encoded to `nbytes` in all."""
    dense = report.totals.bytes_after
    return replace(
        report,
        output={**report.output, "files": output.hashes(), "dense_files": report.output["files"]},
        totals=replace(report.totals, bytes_after=nbytes, bytes_as_sparse=None),
        gain=gain_of_sparse_files(str(job.pattern), dense, nbytes),
    )
