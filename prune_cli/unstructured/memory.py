"""What a run that makes weights sparse takes in memory."""

from __future__ import annotations

from prune_cli.engine.estimated_memory import Estimate, LayersSolved, estimate_of, pruning_phase
from prune_cli.engine.expected import Sizes
from prune_cli.model.orientation import matrix_shape
from prune_cli.unstructured.prepare import PruningPlan


def estimated_memory(plan: PruningPlan, sizes: Sizes) -> Estimate:
    """By the headers of its files, and by how much text there is."""
    infos = [plan.decisions[name].info for name in plan.pruned_names()]
    layers = LayersSolved(
        largest=max((info.entry.count // info.slices for info in infos), default=0),
        widest=max((matrix_shape(info)[1] for info in infos), default=0),
        gram="gram" in plan.pipeline.needs,
    )
    tokens = None if plan.calibration is None else sizes.calibration
    streams = 2 if plan.request.target == "dense" else 1
    return estimate_of(plan, sizes, pruning_phase("pruning", plan, tokens, streams, layers))
