"""What a structured run would do, told by --dry-run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from prune_cli.checkpoint.layout import changed_layout
from prune_cli.engine.estimated_memory import LayersSolved, peak_bytes, working_memory
from prune_cli.engine.evaluate import GROUP_BYTES, STATES_PER_TOKEN
from prune_cli.engine.expected import Seconds, likely_sizes
from prune_cli.engine.open_model import given_tokens
from prune_cli.engine.pace import measured_pace
from prune_cli.model.orientation import matrix_shape
from prune_cli.packed.output import describe
from prune_cli.report.types import NotLoaded, Size
from prune_cli.request.request import PruneRequest
from prune_cli.structured.build_report import gain_of_sizes, sizes, what_is_not_loaded
from prune_cli.structured.cost import Cost
from prune_cli.structured.method import removal_of
from prune_cli.structured.prepare import PreparedStructure, prepare_structured
from prune_cli.structured.stages import stages_of
from prune_cli.structured.stored_output import stored_output


@dataclass(frozen=True)
class StructuredDryRun:
    """Sizes before and after, and what choice and refit cost: `forward_passes` of the calibration text.

    Memory and `seconds` are estimates, evaluation included; `peak_device_bytes` is None on a CPU.
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
    removal = removal_of(prepared)
    change = removal.example()
    entries = changed_layout(prepared.checkpoint, change.tensors).entries
    before, after = sizes(prepared, change, entries, stored_output(prepared, change).layout.nbytes)
    tokens = given_tokens(prepared)
    cost = removal.cost("" if tokens is None else f" of {tokens:,} tokens")
    peak = peak_bytes(prepared, tokens, _working_memory(prepared, cost, tokens))
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
        peak_host_bytes=peak.host,
        peak_device_bytes=peak.device,
        seconds=Seconds.of(stages_of(prepared, cost, likely_sizes(prepared), measured_pace(prepared), left)),
        how=" ".join(cost.how),
        gain=gain_of_sizes(before, after, change),
        packed=describe(prepared.checkpoint),
        notes=change.notes,
        not_loaded=what_is_not_loaded(prepared, change),
    )


def _working_memory(prepared: PreparedStructure, cost: Cost, tokens: int | None) -> int:
    """Of fits with the dense model beside, and of hidden states that wait side by side while blocks are chosen."""
    stages = (*cost.choice, *cost.fit)
    fits = any(stage.fits for stage in stages)
    infos = [
        info for info in prepared.model.tensor_map.values() if info.block is not None and info.role == "linear map"
    ]
    layers = LayersSolved(
        largest=max((info.entry.count // info.slices for info in infos), default=0),
        widest=max((matrix_shape(info)[1] for info in infos), default=0),
        gram=fits,
    )
    work = working_memory(prepared, tokens, 2 if fits else 1, layers)
    most = max((stage.states for stage in stages), default=0.0) * (tokens or 0)
    states = most * prepared.model.hidden_size * prepared.dtype.itemsize * STATES_PER_TOKEN
    return max(work, working_memory(prepared, 0, 1, LayersSolved()) + min(int(states), GROUP_BYTES))
