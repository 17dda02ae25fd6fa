"""What a structured run takes in memory."""

from __future__ import annotations

from prune_cli.engine.activation_budget import ActivationBudget
from prune_cli.engine.estimated_memory import Estimate, LayersSolved, Phase, estimate_of, pruning_phase
from prune_cli.engine.evaluate import STATES_PER_TOKEN
from prune_cli.engine.expected import Sizes
from prune_cli.model.orientation import matrix_shape
from prune_cli.structured.cost import Cost
from prune_cli.structured.prepare import PreparedStructure


def estimated_memory(prepared: PreparedStructure, cost: Cost, sizes: Sizes) -> Estimate:
    """Of the fit, with the dense model beside, and of the choice."""
    tokens = None if prepared.calibration is None else sizes.calibration
    stages = (*cost.choice, *cost.fit)
    fits = any(stage.fits for stage in stages)
    streams = 2 if fits or any(stage.both for stage in stages) else 1
    infos = [
        info for info in prepared.model.tensor_map.values() if info.block is not None and info.role == "linear map"
    ]
    layers = LayersSolved(
        largest=max((info.entry.count // info.slices for info in infos), default=0),
        widest=max((matrix_shape(info)[1] for info in infos), default=0),
        gram=fits,
    )
    work = pruning_phase("fitting" if streams > 1 else "writing", prepared, tokens, streams, layers)
    return estimate_of(prepared, sizes, work, _choosing(prepared, cost, tokens))


def _choosing(prepared: PreparedStructure, cost: Cost, tokens: int | None) -> Phase:
    """Hidden states of the whole text that wait side by side, once for each of as many candidates as have room."""
    phase = pruning_phase("choosing", prepared, 0, 1, LayersSolved())
    most = max((stage.states for stage in (*cost.choice, *cost.fit)), default=0.0)
    once = (tokens or 0) * prepared.model.hidden_size * prepared.dtype.itemsize * STATES_PER_TOKEN

    def states(budget: ActivationBudget) -> int:
        return int(min(most * once, max(once, budget.together)))

    return Phase("choosing", phase.parts, states, "give fewer --samples or a shorter --seq-len")
