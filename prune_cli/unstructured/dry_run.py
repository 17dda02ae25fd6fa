"""What a run would do, told by --dry-run before anything is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from prune_cli.engine.expected import Seconds, likely_sizes
from prune_cli.engine.memory_limit import within_memory
from prune_cli.engine.open_model import given_tokens
from prune_cli.packed.output import describe, output_bytes
from prune_cli.report.gains import gain_of_sparse_files, gain_of_zeros
from prune_cli.report.memory import MemoryPlan
from prune_cli.report.types import NotLoaded
from prune_cli.request.request import PruneRequest
from prune_cli.sparse.saved_bytes import saved_bytes
from prune_cli.unstructured.build_report import what_is_not_loaded
from prune_cli.unstructured.memory import estimated_memory
from prune_cli.unstructured.plan import n_of_m, pruned_parameters
from prune_cli.unstructured.prepare import PruningPlan, prepare
from prune_cli.unstructured.probe import measured_pruning_pace
from prune_cli.unstructured.stages import stages_of


@dataclass(frozen=True)
class ClassOfTensors:
    """Tensors that share a role and a fate."""

    role: str
    action: str
    tensors: int
    parameters: int
    reason: str


@dataclass(frozen=True)
class DryRun:
    """What headers, texts that are near, and a block tell; `bytes_written` are those of the output's weights.

    Of the `calibration_tokens`, the dense model would sample `sampled_tokens`.

    Peaks are estimates in bytes, evaluation included, and within `memory` where the run is fitted into less than usual;
    `peak_device_bytes` is None on a CPU. `seconds` are estimated
    from a probe: a batch of random tokens through a block, which is pruned.
    """

    model: str
    revision: str | None
    architecture: str
    method: str
    pattern: str
    device: str
    compute_dtype: str
    classes: Sequence[ClassOfTensors]
    parameters: int
    pruned_parameters: int
    zeros: int
    bytes_read: int
    bytes_written: int
    calibration_tokens: int | None
    sampled_tokens: int
    peak_host_bytes: int
    peak_device_bytes: int | None
    memory: MemoryPlan | None
    seconds: Seconds
    gain: str
    packed: str | None
    not_loaded: tuple[NotLoaded, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def dry_run(request: PruneRequest) -> DryRun:
    """Everything `prune` would check before it starts, and what it would then do. Raises what `prune` would raise."""
    plan = prepare(request)
    sizes = likely_sizes(plan)
    estimate = estimated_memory(plan, sizes)
    plan = within_memory(plan, estimate)
    given = given_tokens(plan)
    sampled = 0 if given is None else given * plan.copies(given)
    tokens = None if given is None else given + sampled
    zeros = {name: pruned_parameters(plan.decisions[name].info, plan.pattern) for name in plan.pruned_names()}
    sparse = _sparse_bytes(plan, zeros)
    return DryRun(
        model=request.model,
        revision=plan.source.revision,
        architecture=type(plan.model.model).__name__,
        method=str(plan.pipeline),
        pattern=str(plan.pattern),
        device=str(plan.device),
        compute_dtype=str(plan.dtype).removeprefix("torch."),
        classes=_classes(plan),
        parameters=sum(entry.count for entry in plan.checkpoint.entries.values()),
        pruned_parameters=sum(plan.checkpoint.entries[name].count for name in plan.pruned_names()),
        zeros=sum(zeros.values()),
        bytes_read=plan.checkpoint.nbytes * 2,
        bytes_written=output_bytes(plan.checkpoint) if sparse is None else sparse,
        calibration_tokens=tokens,
        sampled_tokens=sampled,
        peak_host_bytes=estimate.host(plan.budget),
        peak_device_bytes=estimate.device(plan.budget),
        memory=plan.memory,
        seconds=Seconds.of(stages_of(plan, sizes, measured_pruning_pace(plan))),
        gain=gain_of_zeros(n_of_m(plan.pattern))
        if sparse is None
        else "Estimated: " + gain_of_sparse_files(n_of_m(plan.pattern), output_bytes(plan.checkpoint), sparse),
        packed=describe(plan.checkpoint),
        not_loaded=what_is_not_loaded(plan),
        warnings=plan.warnings,
    )


def _sparse_bytes(plan: PruningPlan, zeros: Mapping[str, int]) -> int | None:
    """About what the sparse files will take; None where dense ones are asked for."""
    if plan.request.format != "sparse":
        return None
    pattern = n_of_m(plan.pattern)
    return output_bytes(plan.checkpoint) - sum(
        saved_bytes(plan.checkpoint.entries[name], count, pattern) for name, count in zeros.items()
    )


def _classes(plan: PruningPlan) -> list[ClassOfTensors]:
    tensors: Counter[tuple[str, str, str]] = Counter()
    parameters: Counter[tuple[str, str, str]] = Counter()
    for decision in plan.decisions.values():
        key = (decision.info.role, "prune" if decision.prune else "keep", decision.reason)
        tensors[key] += 1
        parameters[key] += decision.info.entry.count
    return [
        ClassOfTensors(role, action, tensors[key], parameters[key], why)
        for key in tensors
        for role, action, why in [key]
    ]
