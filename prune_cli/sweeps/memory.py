"""What one point of a sweep takes in memory; others go beside it as there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prune_cli.engine.activation_budget import ActivationBudget
from prune_cli.engine.estimated_memory import Estimate
from prune_cli.engine.expected import Sizes
from prune_cli.sweeps.point_run import SweepTexts, plan_of
from prune_cli.sweeps.request import Point
from prune_cli.unstructured.memory import estimated_memory
from prune_cli.unstructured.prepare import PruningPlan

# Of the evaluation text, which passes the blocks beside the calibration: the embeddings and what comes to a block.
_STATES_PER_TOKEN = 2


def estimated_memory_of_sweep(plan: PruningPlan, points: Sequence[Point], texts: SweepTexts) -> Estimate:
    """Of the largest of `points`, with the evaluation text beside it."""
    evaluation = texts.evaluation.windows.tokens
    own = evaluation * plan.model.hidden_size * plan.dtype.itemsize
    estimates = [_of_point(plan, point, texts) for point in points]
    largest = max(estimates, key=lambda estimate: estimate.host() + (estimate.device() or 0))
    pruning, *others = largest.phases

    def states(budget: ActivationBudget) -> int:
        parked = own if budget.states is None or not largest.on_host else min(own, budget.states)
        return pruning.states(budget) + _STATES_PER_TOKEN * parked

    return replace(largest, phases=(replace(pruning, name="a point", states=states), *others))


def _of_point(plan: PruningPlan, point: Point, texts: SweepTexts) -> Estimate:
    own = plan_of(point, plan, plan.model)
    given = 0 if texts.calibration is None or not own.pipeline.needs else texts.calibration.windows.tokens
    sizes = Sizes(given, point.copies * given, texts.evaluation.windows.tokens)
    return estimated_memory(own, sizes)
