"""What a sweep would do, told by --dry-run before any weight is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from prune_cli.engine.expected import Seconds
from prune_cli.progress import Progress
from prune_cli.report.memory import MemoryPlan
from prune_cli.sweeps.request import SweepRequest
from prune_cli.sweeps.run import expected_stages, plan_sweep
from prune_cli.unstructured.probe import measured_pruning_pace


@dataclass(frozen=True)
class Estimate:
    """`passes` over the model's weights, the dense evaluation among them; tokens are those of one pass of one point.

    `memory` is what the sweep is fitted into, None where it is as usual. `seconds` come from a probe of each method on
    one block.
    """

    model: str
    architecture: str
    devices: Sequence[str]
    compute_dtype: str
    points: Mapping[str, int]
    blocks_alone: int
    side_by_side: int
    bytes_of_point: int
    memory: MemoryPlan | None
    passes: int
    calibration_tokens: int
    evaluation_tokens: int
    seconds: Seconds

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def estimate(request: SweepRequest, progress: Progress) -> Estimate:
    """Everything that `sweep` would check before it starts, and what it would then do."""
    sweep_plan = plan_sweep(request, progress)
    plan, texts = sweep_plan.plan, sweep_plan.texts
    load = sweep_plan.load(sweep_plan.points)
    follow = sum(point.request.target == "dense" for point in sweep_plan.points)
    alone = len(sweep_plan.points) - follow
    return Estimate(
        model=request.model,
        architecture=type(plan.model.model).__name__,
        devices=[str(each.device) for each in sweep_plan.plans],
        compute_dtype=str(plan.dtype).removeprefix("torch."),
        points=dict(Counter(point.method for point in sweep_plan.grid)),
        blocks_alone=len(sweep_plan.alone),
        side_by_side=load.together,
        bytes_of_point=load.bytes_of_point,
        memory=plan.memory,
        passes=1 + sum(-(-count // load.together) for count in (follow, alone)),
        calibration_tokens=texts.calibration.ids.numel() if texts.calibration else 0,
        evaluation_tokens=texts.evaluation.ids.numel(),
        seconds=Seconds.of(expected_stages(sweep_plan, measured_pruning_pace)),
    )
