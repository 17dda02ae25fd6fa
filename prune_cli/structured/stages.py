"""The stages of a structured run, with about how many seconds each takes."""

from __future__ import annotations

from prune_cli.engine import perplexity
from prune_cli.engine.expected import Sizes, evaluating, generating, looking_at
from prune_cli.engine.pace import Pace
from prune_cli.model.orientation import matrix_shape
from prune_cli.structured.cost import Cost, Pass
from prune_cli.structured.prepare import PreparedStructure
from prune_cli.time_left import ExpectedStage

# Multiplications of a fit: a token's part in the two matrices of a layer's inputs, and products (out, in) x (in, in)
# to solve with them.
_OF_STATISTICS, _OF_SOLVER = 1, 2


def stages_of(
    prepared: PreparedStructure, cost: Cost, sizes: Sizes, pace: Pace, blocks_left: float
) -> list[ExpectedStage]:
    """In the order of `prune_structured`, by how its titles begin; `blocks_left` is the share that stays."""
    nbytes = prepared.checkpoint.nbytes
    choice = () if prepared.request.statistics is not None else cost.choice
    return [
        looking_at(prepared.checkpoint, pace),
        *evaluating(perplexity.BEFORE, sizes, pace),
        *[_passing(prepared, each, sizes, pace) for each in choice],
        ExpectedStage("Writing", "copying", blocks_left * nbytes * pace.copy),
        *[_passing(prepared, each, sizes, pace) for each in cost.fit],
        *evaluating(perplexity.AFTER, sizes, pace, blocks_left),
        *generating(prepared, pace),
    ]


def _passing(prepared: PreparedStructure, each: Pass, sizes: Sizes, pace: Pace) -> ExpectedStage:
    tokens = sizes.calibration
    forward = tokens * (each.forwards * pace.block + each.heads * pace.head) + each.forwards * pace.load
    fits = 0.0
    if each.fits:
        of_token, solving = _multiplications(prepared)
        fits = each.fits * (each.fitted_on * tokens * of_token + solving) * pace.multiplication
    return ExpectedStage(each.title, each.title, forward + fits)


def _multiplications(prepared: PreparedStructure) -> tuple[float, float]:
    """Of a token in the statistics of all layers of the blocks, and of solving for them once."""
    shapes = [
        matrix_shape(info)
        for info in prepared.model.tensor_map.values()
        if info.block is not None and info.role == "linear map"
    ]
    statistics = sum(_OF_STATISTICS * inputs**2 for _, inputs in shapes)
    return statistics, sum(_OF_SOLVER * out * inputs**2 + inputs**3 for out, inputs in shapes)
