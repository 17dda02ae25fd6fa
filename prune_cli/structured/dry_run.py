"""What a structured run would do, told by --dry-run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from prune_cli.checkpoint.layout import changed_layout
from prune_cli.engine.expected import Seconds, likely_sizes
from prune_cli.engine.memory_limit import within_memory
from prune_cli.engine.open_model import given_tokens
from prune_cli.engine.pace import measured_pace
from prune_cli.packed.output import describe
from prune_cli.report.memory import MemoryPlan
from prune_cli.report.types import NotLoaded, Size
from prune_cli.request.request import PruneRequest
from prune_cli.structured.build_report import gain_of_sizes, sizes, what_is_not_loaded
from prune_cli.structured.memory import estimated_memory
from prune_cli.structured.method import removal_of
from prune_cli.structured.prepare import prepare_structured
from prune_cli.structured.stages import stages_of
from prune_cli.structured.stored_output import stored_output


@dataclass(frozen=True)
class StructuredDryRun:
    """Sizes before and after, and what choice and refit cost: `forward_passes` of the calibration text.

    Memory, as `memory` has it where the run is fitted into less than usual, and `seconds` are estimates, evaluation
    included; `peak_device_bytes` is None on a CPU.
    """

    model: str
    revision: str | None
    architecture: str
    method: str
    asked: str
    device: str
    compute_dtype: str
    before: Size
    after: Size
    calibration_tokens: int | None
    forward_passes: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    memory: MemoryPlan | None
    seconds: Seconds
    how: str
    gain: str
    packed: str | None
    notes: tuple[str, ...]
    not_loaded: tuple[NotLoaded, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def dry_run_structured(request: PruneRequest) -> StructuredDryRun:
    """Everything `prune` would check before it starts, and what it would then do. Raises what `prune` would raise."""
    prepared = prepare_structured(request)
    sizes_of_texts = likely_sizes(prepared)
    estimate = estimated_memory(prepared, removal_of(prepared).cost(""), sizes_of_texts)
    prepared = within_memory(prepared, estimate)
    removal = removal_of(prepared)
    change = removal.example()
    entries = changed_layout(prepared.checkpoint, change.tensors).entries
    before, after = sizes(prepared, change, entries, stored_output(prepared, change).layout.nbytes)
    tokens = given_tokens(prepared)
    cost = removal.cost("" if tokens is None else f" of {tokens:,} tokens")
    left = removal.bytes_at_most() / prepared.checkpoint.nbytes
    return StructuredDryRun(
        model=request.model,
        revision=prepared.source.revision,
        architecture=type(prepared.model.model).__name__,
        method=request.method,
        asked=removal.asked(),
        device=str(prepared.device),
        compute_dtype=str(prepared.dtype).removeprefix("torch."),
        before=before,
        after=after,
        calibration_tokens=tokens,
        forward_passes=cost.forwards,
        peak_host_bytes=estimate.host(prepared.budget),
        peak_device_bytes=estimate.device(prepared.budget),
        memory=prepared.memory,
        seconds=Seconds.of(stages_of(prepared, cost, sizes_of_texts, measured_pace(prepared), left)),
        how=" ".join(cost.how),
        gain=gain_of_sizes(before, after, change),
        packed=describe(prepared.checkpoint),
        notes=(*change.notes, *prepared.warnings),
        not_loaded=what_is_not_loaded(prepared, change),
    )
