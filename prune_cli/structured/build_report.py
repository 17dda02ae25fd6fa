"""Gathers what a structured run knows at its end into the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from calibration.tokens import TokenSet
from prune_cli.checkpoint.dtypes import FLOATS, data_bytes
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint, TensorEntry
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.provenance import (
    batch_size_of,
    environment,
    measured,
    model_facts,
    text_report,
    warnings_of,
    zeros_in,
)
from prune_cli.model.shape_overrides import is_sized
from prune_cli.report.provenance import now, tool_facts
from prune_cli.report.types import (
    SCHEMA_VERSION,
    BlockReport,
    Evaluation,
    MethodReport,
    Output,
    Report,
    Size,
    StructureReport,
    TensorReport,
    Totals,
)
from prune_cli.request.request import PruneRequest
from prune_cli.structured.config import config_from
from prune_cli.structured.depth import choose as depth
from prune_cli.structured.model_size import size_of
from prune_cli.structured.moe import choose as experts
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure
from prune_cli.structured.width import narrow as width


def assemble_structured(
    request: PruneRequest,
    job: PreparedStructure,
    change: StructuredPlan,
    output: OutputFolder,
    calibration: TokenSet | None,
    evaluation: TokenSet | None,
    before: Evaluation | None,
    after: Evaluation | None,
    memory: PeakMemory,
    seconds: float,
) -> Report:
    """The report of a finished run; zeros are counted in the written files."""
    written = output.checkpoint()
    zeros = {name: zeros_in(written, name) for name in written.entries}
    structure = _structure(request, job, change, written)
    return Report(
        schema_version=SCHEMA_VERSION,
        tool=tool_facts(),
        created=now(),
        request=request,
        environment=environment(job, batch_size_of(request, job, calibration)),
        model=model_facts(job, output),
        output=Output(str(request.out), output.hashes()),
        method=MethodReport(request.method, job.method.summary, [job.method.paper], asdict(job.options)),
        allocation=None,
        calibration=text_report(calibration) if calibration else None,
        output_error_rows=None,
        evaluation=measured(evaluation, before, after),
        totals=Totals(
            parameters=structure.after.parameters,
            pruned_parameters=0,
            zeros_in_pruned=0,
            sparsity_of_pruned=0.0,
            sparsity_of_model=sum(count or 0 for count in zeros.values()) / structure.after.parameters,
            bytes_before=structure.before.bytes,
            bytes_after=structure.after.bytes,
        ),
        structure=structure,
        gain=gain_of_sizes(structure.before, structure.after, change),
        blocks=[
            BlockReport(group, line["seconds"], group in output.resumed) for group, line in sorted(output.done.items())
        ],
        tensors=_tensors(job, change, written, zeros, output.done.values()),
        seconds=seconds,
        peak_host_bytes=memory.host_bytes,
        peak_device_bytes=memory.device_bytes,
        warnings=warnings_of(output, calibration, evaluation),
    )


def sizes(
    job: PreparedStructure, change: StructuredPlan, entries: Mapping[str, TensorEntry], nbytes: int
) -> tuple[Size, Size]:
    """Of the input, and of an output with these tensors."""
    itemsize = data_bytes(max(_count_by_dtype(job.checkpoint).items(), key=lambda item: item[1])[0], 1)
    trust = job.trust_remote_code
    return (
        size_of(job.model.config, job.checkpoint.entries, job.checkpoint.nbytes, itemsize, trust),
        size_of(config_from(change.config, job.model), entries, nbytes, itemsize, trust),
    )


def _count_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(FLOATS, 0)
    for entry in checkpoint.entries.values():
        if entry.dtype in counts:
            counts[entry.dtype] += entry.count
    return counts


def _structure(
    request: PruneRequest, job: PreparedStructure, change: StructuredPlan, written: Checkpoint
) -> StructureReport:
    before, after = sizes(job, change, written.entries, written.nbytes)
    units_before, units_after = change.units
    in_blocks = sum(info.entry.count for info in job.model.tensor_map.values() if info.block is not None)
    gone = before.parameters - after.parameters
    unused = sum(job.checkpoint.entries[n].count for n in change.dropped if job.model.tensor_map[n].block is None)
    return StructureReport(
        unit=job.method.unit,
        units_before=units_before,
        units_after=units_after,
        asked={"width": width, "experts": experts}.get(request.method, depth).asked(request, job),
        removed_shares={
            **(change.shares or {job.method.unit: 1 - units_after / units_before}),
            "parameters of the blocks": (gone - unused) / in_blocks,
            "parameters": gone / before.parameters,
        },
        before=before,
        after=after,
        blocks=list(change.told),
        notes=change.notes,
    )


def gain_of_sizes(before: Size, after: Size, change: StructuredPlan) -> str:
    """What a smaller dense model brings, said plainly."""
    smaller = 100 * (1 - after.bytes / before.bytes)
    fewer = 100 * (1 - after.macs_per_token / before.macs_per_token)
    # With -o uniform=false config.json lists the shapes as a quantizer of ours would have them.
    plain = not is_sized(change.config.get("quantization_config"))
    return (
        f"A smaller dense model: {smaller:.1f} % less on disk and in memory and {fewer:.1f} % fewer multiplications "
        "per token, "
        + (
            "in plain transformers and in every other runtime; nothing special is needed to load it."
            if plain
            else "in plain transformers; loading it needs import prune_cli, since blocks have sizes of their own."
        )
    )


def _tensors(
    job: PreparedStructure,
    change: StructuredPlan,
    written: Checkpoint,
    zeros: Mapping[str, int | None],
    done: Iterable[Mapping[str, Any]],
) -> list[TensorReport]:
    errors = {name: error for line in done for name, error in line.get("output_errors", {}).items()}
    notes = {name: tuple(texts) for line in done for name, texts in line.get("notes", {}).items()}
    number: dict[Any, int] = {old: new for new, old in enumerate(change.blocks)}
    reports = []
    for name, entry in written.entries.items():
        info = job.model.tensor_map[change.tensors[name].source]
        action, reason = _became(change.tensors[name].shape, info.entry.shape)
        if change.tensors[name].source != name:
            reason += f" ({change.tensors[name].source})"
        block = None if info.block is None else number[info.block]
        report = _report(entry, info.role, block, action, reason, zeros[name])
        reports.append(replace(report, output_error=errors.get(name), notes=notes.get(name, ())))
    for name, reason in change.dropped.items():
        info = job.model.tensor_map[name]
        reports.append(_report(info.entry, info.role, info.block, "removed", reason, None))
    return reports


def _became(shape: tuple[int, ...] | None, before: tuple[int, ...]) -> tuple[str, str]:
    """Action and reason."""
    if shape is None:
        return "kept", "as it was"
    return (
        ("refitted", "fitted to the dense model") if shape == before else ("narrowed", f"narrowed from {list(before)}")
    )


def _report(
    entry: TensorEntry, role: str, block: int | None, action: Any, reason: str, zeros: int | None
) -> TensorReport:
    return TensorReport(
        name=entry.name,
        role=role,
        block=block,
        shape=entry.shape,
        dtype=entry.dtype,
        action=action,
        reason=reason,
        pattern=None,
        asked_sparsity=None,
        sparsity=None if zeros is None or not entry.count else zeros / entry.count,
        output_error=None,
        notes=(),
    )
