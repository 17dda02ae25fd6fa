"""The stages of a run that makes weights sparse, with about how many seconds each takes."""

from __future__ import annotations

from dataclasses import dataclass

from prune_cli.engine import perplexity
from prune_cli.engine.expected import Sizes, copying, evaluating, generating
from prune_cli.engine.output_sensitivity import TOKENS
from prune_cli.engine.pace import Pace, usual_pace
from prune_cli.engine.self_calibration import SAMPLING
from prune_cli.model.orientation import matrix_shape
from prune_cli.recovery.request import EPOCHS
from prune_cli.recovery.stages import PASSES_BESIDE, PASSES_OF_AN_EPOCH
from prune_cli.time_left import ExpectedStage
from prune_cli.unstructured.prepare import PruningPlan

# Where only the shares of a run count: products (out, in) x (in, in) of a solver, operations on a score.
_SOLVER, _SCORES = 16, 50
# Forward and backward pass, with a derivative for each output beside that for the inputs.
_WITH_DERIVATIVES = 5
_ENCODED_BYTES = 5e7
# What the passes over the calibration text are called, that an allocation takes.
_ALLOCATING = {"owl": "Measuring outliers", "global": "Measuring scores"}


@dataclass(frozen=True)
class PruningPace:
    """Seconds: of the model's own work; of a token's part in the statistics of all layers; of solving all layers."""

    model: Pace
    statistics: float
    solving: float


def usual_pruning_pace(plan: PruningPlan) -> PruningPace:
    """From shapes alone; right in proportion, not in seconds."""
    gram = "gram" in plan.pipeline.needs
    statistics = solving = 0.0
    for info in plan.pruned_infos().values():
        out, inputs = matrix_shape(info)
        statistics += info.slices * (inputs**2 / 2 if gram else 2 * inputs)
        solving += info.slices * (_SOLVER * out * inputs**2 if gram else _SCORES * out * inputs)
    model = usual_pace(plan.model)
    return PruningPace(model, statistics * model.multiplication, solving * model.multiplication)


def stages_of(plan: PruningPlan, sizes: Sizes, pace: PruningPace) -> list[ExpectedStage]:
    """In the order of `prune_unstructured`, by the titles that it tells."""
    encoding = ExpectedStage(encoding_title(plan), "encoding", plan.checkpoint.nbytes / _ENCODED_BYTES)
    return [
        *_sampling(sizes, pace.model),
        copying(plan.checkpoint, pace.model),
        *evaluating(perplexity.BEFORE, sizes, pace.model),
        *_allocating(plan, sizes, pace),
        _pruning(plan, sizes, pace),
        *evaluating(perplexity.AFTER, sizes, pace.model),
        *generating(plan, pace.model),
        *([encoding] if plan.request.format == "sparse" else []),
    ]


def pruning_title(plan: PruningPlan) -> str:
    return f"Pruning with {plan.pipeline}"


def encoding_title(plan: PruningPlan) -> str:
    return f"Encoding {len(plan.checkpoint.files)} file(s)"


def _sampling(sizes: Sizes, pace: Pace) -> list[ExpectedStage]:
    """Each sampled token costs about a look at the logits of the given one."""
    work = sizes.given * pace.block + sizes.calibration * pace.head + pace.load
    return [ExpectedStage(SAMPLING, "evaluation", work)] if sizes.sampled else []


def _allocating(plan: PruningPlan, sizes: Sizes, pace: PruningPace) -> list[ExpectedStage]:
    strategy, forward = plan.request.allocation, sizes.calibration * pace.model.block + pace.model.load
    if strategy == "sensitivity":
        work = _WITH_DERIVATIVES * min(sizes.calibration, TOKENS) * pace.model.block + pace.model.load
        return [ExpectedStage("Measuring sensitivities", "sensitivities", work)]
    if strategy == "atp" and plan.request.allocation_options().slope is None:
        tried = plan.request.allocation_options().candidates
        titles = [f"Trying slope {at + 1} of {tried}" for at in range(tried)]
        return [ExpectedStage(title, "trying", forward + sizes.calibration * pace.model.head) for title in titles]
    return [ExpectedStage(_ALLOCATING[strategy], "allocating", forward)] if strategy in _ALLOCATING else []


def _pruning(plan: PruningPlan, sizes: Sizes, pace: PruningPace) -> ExpectedStage:
    request, tokens = plan.request, sizes.calibration
    beside = request.target == "dense" or request.match_blocks
    passes = 1 + beside + (request.calibrate_by == "block")
    if request.match_blocks:
        passes += EPOCHS * PASSES_OF_AN_EPOCH + PASSES_BESIDE
    forward = passes * tokens * pace.model.block + (1 + beside) * pace.model.load
    return ExpectedStage(pruning_title(plan), "pruning", forward + tokens * pace.statistics + pace.solving)
