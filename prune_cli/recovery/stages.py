"""The stages of `recover`, with about how many seconds each takes."""

from __future__ import annotations

from prune_cli.engine.expected import Sizes, copying, evaluating
from prune_cli.engine.pace import Pace, usual_pace
from prune_cli.engine.self_calibration import SAMPLING
from prune_cli.recovery.end_to_end import TRAINING
from prune_cli.recovery.match_blocks import MATCHING
from prune_cli.recovery.prepare import RecoveryPlan, RecoveryTexts
from prune_cli.recovery.teacher_store import ASKING
from prune_cli.time_left import ExpectedStage

TEACHER, BEFORE, AFTER = "Loss of the teacher", "Loss before", "Loss after"
# A step forward and back of an epoch, with the error on what is held out; and the passes of both models beside.
PASSES_OF_AN_EPOCH, PASSES_BESIDE = 4, 2


def stages_of(plan: RecoveryPlan, texts: RecoveryTexts) -> list[ExpectedStage]:
    """In the order of `recover`; right in proportion, not in seconds."""
    given, copies = texts.calibration.windows.tokens, plan.request.self_calibration
    sizes = Sizes(given, given * copies, texts.evaluation.windows.tokens)
    ours, theirs = usual_pace(plan.model), usual_pace(plan.pair.teacher)
    sampling = sizes.given * theirs.block + sizes.calibration * theirs.head + theirs.load
    return [
        copying(plan.checkpoint, ours),
        *evaluating(TEACHER, sizes, theirs),
        *evaluating(BEFORE, sizes, ours),
        *([ExpectedStage(SAMPLING, "evaluation", sampling)] if copies else []),
        *_training(plan, sizes, ours, theirs),
        *evaluating(AFTER, sizes, ours),
    ]


def _training(plan: RecoveryPlan, sizes: Sizes, ours: Pace, theirs: Pace) -> list[ExpectedStage]:
    request, tokens = plan.request, sizes.calibration
    if request.end_to_end:
        asking = tokens * (theirs.block + theirs.head) + theirs.load
        seen = request.passes * tokens if request.tokens is None else request.tokens
        training = PASSES_OF_AN_EPOCH * seen * (ours.block + ours.head)
        return [ExpectedStage(ASKING, "evaluation", asking), ExpectedStage(TRAINING, "training", training)]
    passes = request.passes * PASSES_OF_AN_EPOCH + PASSES_BESIDE
    matching = tokens * (passes * ours.block + theirs.block) + ours.load + theirs.load
    return [ExpectedStage(MATCHING, "matching", matching)]
