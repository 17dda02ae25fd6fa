"""The stages of a search, with about how many seconds each takes."""

from __future__ import annotations

from prune_cli.engine.self_calibration import SAMPLING
from prune_cli.sweeps.point_run import SweepTexts
from prune_cli.sweeps.request import Point
from prune_cli.sweeps.search import generations
from prune_cli.sweeps.search_request import SearchRequest
from prune_cli.sweeps.stages import EVALUATING, MEASURING, stages_of_sweep
from prune_cli.time_left import ExpectedStage
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.stages import usual_pruning_pace

SEARCHING, EVOLVING, MEASURING_BEST = "Random search", "Evolution", "Measuring the best"


def stages_of_search(
    request: SearchRequest, point: Point, plan: PruningPlan, final: SweepTexts, judging: SweepTexts, workers: int
) -> list[ExpectedStage]:
    """In the order of `search`: candidates are like `point`, judged on one text, and the best measured on another."""
    measured, judged = (
        stages_of_sweep([point], plan, texts, usual_pruning_pace, workers) for texts in (final, judging)
    )
    sizes = list(generations(request.budget)) if request.strategy == "evolution" else []
    work = _work_of_a_point(judged)
    return [
        *(stage for stage in (*measured, *judged) if stage.title == SAMPLING),
        *(stage for stage in measured if stage.title == EVALUATING),
        ExpectedStage(SEARCHING, "measuring", request.budget * work),
        *(ExpectedStage(EVOLVING, "measuring", size * work) for size in sizes),
        # The uniform one, and the best of each search.
        ExpectedStage(MEASURING_BEST, "measuring", (3 if sizes else 2) * _work_of_a_point(measured)),
    ]


def _work_of_a_point(stages: list[ExpectedStage]) -> float:
    return sum(stage.work for stage in stages if stage.title == MEASURING)
