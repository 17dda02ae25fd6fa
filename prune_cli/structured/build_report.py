"""Gathers what a structured run knows at its end into the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from prune_cli.checkpoint.dtypes import FLOATS, data_bytes
from prune_cli.checkpoint.reader import Checkpoint, TensorEntry
from prune_cli.engine.inputs import all_inputs
from prune_cli.engine.not_loaded import not_loaded
from prune_cli.engine.provenance import (
    batch_size_of,
    environment,
    model_facts,
    text_report,
    warnings_of,
    zeros_in,
)
from prune_cli.engine.run_context import Run
from prune_cli.model.shape_overrides import is_sized
from prune_cli.report.provenance import now, tool_facts
from prune_cli.report.types import (
    SCHEMA_VERSION,
    BlockReport,
    EvaluationReport,
    MethodReport,
    NotLoaded,
    Output,
    Report,
    Size,
    StructureReport,
    TensorReport,
    Totals,
)
from prune_cli.structured.config import config_from
from prune_cli.structured.extra_heads import DROPPED
from prune_cli.structured.model_size import size_of
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure


def assemble_structured(
    run: Run[PreparedStructure], asked: str, change: StructuredPlan, evaluation: EvaluationReport | None, seconds: float
) -> Report:
    """The report of a finished run, for which was `asked`; zeros are counted in the written files."""
    prepared, output, calibration = run.plan, run.output, run.texts.calibration
    written = output.checkpoint()
    zeros = {name: zeros_in(written, name) for name in written.entries}
    structure = _structure(prepared, asked, change, written)
    return Report(
        schema_version=SCHEMA_VERSION,
        tool=tool_facts(),
        created=now(),
        request=run.request,
        environment=environment(prepared, batch_size_of(prepared, calibration)),
        model=model_facts(prepared, output.input_hashes),
        inputs=all_inputs(run),
        output=Output(str(run.request.out), output.hashes()),
        method=MethodReport(
            run.request.method, prepared.method.summary, [prepared.method.paper], asdict(prepared.options)
        ),
        allocation=None,
        calibration=text_report(calibration) if calibration else None,
        output_error_rows=None,
        evaluation=evaluation,
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
        matched=change.matched,
        tensors=_tensors(prepared, change, written, zeros, output.done.values()),
        seconds=seconds,
        peak_host_bytes=run.memory.host_bytes,
        peak_device_bytes=run.memory.device_bytes,
        memory=prepared.memory,
        warnings=warnings_of(run),
        not_loaded=what_is_not_loaded(prepared, change),
    )


def what_is_not_loaded(prepared: PreparedStructure, change: StructuredPlan) -> tuple[NotLoaded, ...]:
    """Extra heads and other tensors without a parameter; what `change` makes of them."""
    new = {planned.source: name for name, planned in change.tensors.items()}

    def became(names: Sequence[str]) -> str:
        stay = [name for name in names if name in new]
        if not stay:
            return "gone: " + "; ".join(dict.fromkeys(change.dropped[name] for name in names))
        name, renamed = stay[0], new[stay[0]]
        now = "kept" if renamed == name else f"kept as {_head_name(prepared, name, renamed)}"
        removed = change.heads.get(prepared.model.tensor_map[name].head or "")
        return f"{now}, {removed}" if removed else now

    return not_loaded(prepared.model.tensor_map, prepared.checkpoint, became)


def _head_name(prepared: PreparedStructure, name: str, renamed: str) -> str:
    """The new name of the head of a tensor; of another, what it would be called."""
    head = prepared.model.tensor_map[name].head
    if head is None:
        return f"{renamed}, and so on"
    return ".".join(renamed.split(".")[: head.count(".") + 1])


def sizes(
    prepared: PreparedStructure, change: StructuredPlan, entries: Mapping[str, TensorEntry], nbytes: int
) -> tuple[Size, Size]:
    """Of the input, and of an output with these tensors."""
    itemsize = data_bytes(max(_count_by_dtype(prepared.checkpoint).items(), key=lambda item: item[1])[0], 1)
    trust = prepared.trust_remote_code
    return (
        size_of(prepared.model.config, prepared.checkpoint.entries, prepared.checkpoint.nbytes, itemsize, trust),
        size_of(config_from(change.config, prepared.model), entries, nbytes, itemsize, trust),
    )


def _count_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(FLOATS, 0)
    for entry in checkpoint.entries.values():
        if entry.dtype in counts:
            counts[entry.dtype] += entry.count
    return counts


def _structure(prepared: PreparedStructure, asked: str, change: StructuredPlan, written: Checkpoint) -> StructureReport:
    before, after = sizes(prepared, change, written.entries, written.nbytes)
    units_before, units_after = change.units
    infos = prepared.model.tensor_map
    in_blocks = sum(info.entry.count for info in infos.values() if info.block is not None)
    left = sum(
        written.entries[name].count
        for name, planned in change.tensors.items()
        if infos[planned.source].block is not None
    )
    left_out = sum(infos[name].entry.count for name, reason in change.dropped.items() if reason == DROPPED)
    return StructureReport(
        unit=prepared.method.unit,
        units_before=units_before,
        units_after=units_after,
        asked=asked,
        removed_shares={
            **(change.shares or {prepared.method.unit: 1 - units_after / units_before}),
            "parameters of the blocks": (in_blocks - left) / in_blocks,
            "parameters": (before.parameters - after.parameters - left_out) / before.parameters,
        },
        before=before,
        after=after,
        blocks=list(change.told),
        notes=change.notes,
        compared=change.compared,
    )


def gain_of_sizes(before: Size, after: Size, change: StructuredPlan) -> str:
    """What a smaller dense model brings, said plainly."""
    smaller = 100 * (1 - after.bytes / before.bytes)
    fewer = 100 * (1 - after.macs_per_token / before.macs_per_token)
    # With -o uniform=false config.json lists the shapes as a quantizer of ours would have them.
    plain = not is_sized(change.config.get("quantization_config"))
    where = "in plain transformers; loading it needs import prune_cli, since blocks have sizes of their own."
    if plain and change.misfits:
        where = "in plain transformers, and in other runtimes where they leave out what the notes tell of."
    elif plain:
        where = "in plain transformers and in every other runtime; nothing special is needed to load it."
    return (
        f"A smaller dense model: {smaller:.1f} % less on disk and in memory and {fewer:.1f} % fewer multiplications "
        f"per token, {where}"
    )


def _tensors(
    prepared: PreparedStructure,
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
        info = prepared.model.tensor_map[change.tensors[name].source]
        action, reason = _became(change.tensors[name].shape, info.entry.shape)
        reason = "names experts by their new numbers" if name in change.tables else reason
        if change.tensors[name].source != name:
            reason += f" ({change.tensors[name].source})"
        block = None if info.block is None else number[info.block]
        report = _report(entry, info.role, block, action, reason, zeros[name])
        told = {"output_error": errors.get(name), "notes": notes.get(name, ())}
        reports.append(replace(report, dtype=written.stored_dtype(name), **told))
    for name, reason in change.dropped.items():
        info = prepared.model.tensor_map[name]
        report = _report(info.entry, info.role, info.block, "removed", reason, None)
        reports.append(replace(report, dtype=prepared.checkpoint.stored_dtype(name)))
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
