"""What a structured run would do, told by --dry-run before any weight is read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from prune_cli.errors import RequestError
from prune_cli.estimate import calibration_tokens
from prune_cli.layout import changed_layout
from prune_cli.report import Size
from prune_cli.request import PruneRequest
from prune_cli.structured import depth, experts
from prune_cli.structured.assemble import gain_of_sizes, sizes
from prune_cli.structured.prepare import prepare_structured


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

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def dry_run_structured(request: PruneRequest) -> StructuredDryRun:
    """Everything `prune` would check before it starts, and what it would then do. Raises what `prune` would raise."""
    if request.method == "width":
        raise RequestError(f"--dry-run does not tell the sizes of {request.method} yet: leave it out.")
    job = prepare_structured(request)
    way = experts if request.method == "experts" else depth
    way.check(request, job)
    change = way.example(request, job)
    layout = changed_layout(job.checkpoint, change.tensors)
    before, after = sizes(job, change, layout.entries, layout.nbytes)
    tokens, passes = calibration_tokens(request, job), way.forward_passes(request, job)
    how = f"The {job.method.unit} are named or drawn, so nothing is measured."
    if passes and tokens is not None:
        cost = f"about {passes:.1f} forward passes of {tokens:,} tokens"
        how = f"The {job.method.unit} are chosen first, which costs {cost}."
        if len({tuple(job.checkpoint.entries[n].nbytes for n in job.model.block_names(b)) for b in change.blocks}) > 1:
            how += " The sizes are those without the last blocks; others are of another size."
    refit = depth.refit_passes(request, job) if request.method == "depth" else 0.0
    if refit and tokens is not None:
        how += f" Refitting what is left costs about {refit:.1f} forward passes, and Gram matrices of the maps' inputs."
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
        forward_passes=passes + refit,
        how=how,
        gain=gain_of_sizes(before, after),
    )
