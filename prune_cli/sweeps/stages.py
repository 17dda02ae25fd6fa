"""The stages of a sweep, with about how many seconds each takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prune_cli.engine import perplexity
from prune_cli.engine.expected import Sizes, evaluating
from prune_cli.engine.self_calibration import SAMPLING
from prune_cli.sweeps.point_run import SweepTexts, plan_of
from prune_cli.sweeps.request import Point
from prune_cli.time_left import ExpectedStage
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.stages import PruningPace, stages_of

EVALUATING, MEASURING = "Evaluating the dense model", "Measuring"
# Of a run of `prune`, what a sweep does once for all points with the same text.
_SHARED = (SAMPLING, "Measuring sensitivities")


def stages_of_sweep(
    points: Sequence[Point],
    plan: PruningPlan,
    texts: SweepTexts,
    pace_of: Callable[[PruningPlan], PruningPace],
    workers: int,
) -> list[ExpectedStage]:
    """In the order of `sweep`, by how its titles begin; points are shared out among `workers`."""
    shared: dict[tuple[str, int], ExpectedStage] = {}
    paces: dict[tuple[str, str], PruningPace] = {}
    measuring = 0.0
    for point in points:
        own = plan_of(point, plan, plan.model)
        kind = (str(own.pipeline), own.request.target)
        if kind not in paces:
            paces[kind] = pace_of(own)
        stages = stages_of(own, _sizes(point, own, texts), paces[kind])
        shared |= {(each.title, point.copies): each for each in stages if each.title in _SHARED}
        measuring += sum(each.work for each in stages if each.kind in ("pruning", "evaluation", "trying", "allocating"))
        measuring -= sum(each.work for each in stages if each.title in (SAMPLING, perplexity.BEFORE))
    return [
        *(stage for title in _SHARED for (name, _), stage in shared.items() if name == title),
        *evaluating(EVALUATING, _sizes(points[0], plan, texts), next(iter(paces.values())).model),
        ExpectedStage(MEASURING, "measuring", measuring / workers),
    ]


def _sizes(point: Point, plan: PruningPlan, texts: SweepTexts) -> Sizes:
    given = 0 if texts.calibration is None or not plan.pipeline.needs else texts.calibration.windows.tokens
    return Sizes(given, point.copies * given, texts.evaluation.windows.tokens)
