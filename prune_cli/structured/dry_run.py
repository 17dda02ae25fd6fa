"""What a structured run would do, told by --dry-run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from prune_cli.checkpoint.layout import changed_layout
from prune_cli.engine.open_model import calibration_tokens
from prune_cli.packed.output import describe
from prune_cli.report.types import Size
from prune_cli.request.request import PruneRequest
from prune_cli.structured.build_report import gain_of_sizes, sizes
from prune_cli.structured.depth import choose as depth
from prune_cli.structured.moe import choose as experts
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure, prepare_structured
from prune_cli.structured.stored_output import stored_output
from prune_cli.structured.width import narrow as width


@dataclass(frozen=True)
class StructuredDryRun:
    """Sizes before and after, and what choice and refit cost: `forward_passes` of the calibration text."""

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
    how: str
    gain: str
    packed: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def dry_run_structured(request: PruneRequest) -> StructuredDryRun:
    """Everything `prune` would check before it starts, and what it would then do. Raises what `prune` would raise."""
    job = prepare_structured(request)
    way = {"width": width, "experts": experts}.get(request.method, depth)
    change = _example(request, job)
    entries = changed_layout(job.checkpoint, change.tensors).entries
    before, after = sizes(job, change, entries, stored_output(job, change).layout.nbytes)
    tokens, (choice, fit) = calibration_tokens(request, job), _passes(request, job)
    how = _how_width if request.method == "width" else _how
    text = "" if tokens is None else f" of {tokens:,} tokens"
    return StructuredDryRun(
        model=request.model,
        revision=job.source.revision,
        architecture=type(job.model.model).__name__,
        method=request.method,
        asked=way.asked(request, job),
        device=str(job.device),
        compute_dtype=str(job.dtype).removeprefix("torch."),
        before=before,
        after=after,
        calibration_tokens=tokens,
        forward_passes=choice + fit,
        how=how(request, job, text, choice, fit),
        gain=gain_of_sizes(before, after, change),
        packed=describe(job.checkpoint),
    )


def _example(request: PruneRequest, job: PreparedStructure) -> StructuredPlan:
    """A change of the size that was asked for, after all checks."""
    if request.method == "width":
        return width.example(request, job)
    way = experts if request.method == "experts" else depth
    way.check(request, job)
    return way.example(request, job)


def _passes(request: PruneRequest, job: PreparedStructure) -> tuple[float, float]:
    """How many passes of the calibration text the choice costs, and the fit."""
    if request.method == "width":
        return width.passes(job)
    if request.method == "experts":
        return experts.forward_passes(request, job), 0.0
    return depth.forward_passes(request, job), depth.refit_passes(request, job)


def _how(request: PruneRequest, job: PreparedStructure, text: str, choice: float, fit: float) -> str:
    """What is chosen when, and at what cost."""
    if not choice:
        told = [f"The {job.method.unit} are named or drawn, so nothing is measured."]
    else:
        told = [f"The {job.method.unit} are chosen first, which costs about {choice:.1f} forward passes{text}."]
        if request.method == "depth" and _blocks_differ(job):
            told.append("The sizes are those without the last blocks; others are of another size.")
        told += _saved(request)
    if fit:
        told.append(
            f"Refitting what is left costs about {fit:.1f} forward passes, and Gram matrices of the maps' inputs."
        )
    return " ".join(told)


def _how_width(request: PruneRequest, job: PreparedStructure, text: str, sizes_first: float, fit: float) -> str:
    told: list[str] = []
    if sizes_first:
        told.append(
            f"How many {job.method.unit} each block keeps costs one forward pass{text}; their sum is known before, so "
            "that the sizes told here change by no more than a few bytes of file headers."
        )
        told += _saved(request)
    if fit:
        told.append(
            f"Choosing those that go and fitting what is left costs about {fit:.1f} forward passes{text}, and "
            "statistics of the maps' inputs."
        )
    else:
        told.append("Those that go are chosen by the weights alone.")
    return " ".join(told)


def _saved(request: PruneRequest) -> list[str]:
    return [] if request.statistics is None else ["What --statistics holds is not measured again."]


def _blocks_differ(job: PreparedStructure) -> bool:
    kinds = {
        tuple(job.checkpoint.entries[name].nbytes for name in job.model.block_names(block))
        for block in range(len(job.model.blocks))
    }
    return len(kinds) > 1
