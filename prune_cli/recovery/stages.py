"""The stages of `recover`, with about how many seconds each takes."""

from __future__ import annotations

from prune_cli.engine.expected import Sizes, copying, evaluating
from prune_cli.engine.pace import usual_pace
from prune_cli.engine.self_calibration import SAMPLING
from prune_cli.recovery.match_blocks import MATCHING
from prune_cli.recovery.prepare import RecoveryPlan, RecoveryTexts
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
    passes = plan.request.epochs * PASSES_OF_AN_EPOCH + PASSES_BESIDE
    matching = sizes.calibration * (passes * ours.block + theirs.block) + ours.load + theirs.load
    return [
        copying(plan.checkpoint, ours),
        *evaluating(TEACHER, sizes, theirs),
        *evaluating(BEFORE, sizes, ours),
        *([ExpectedStage(SAMPLING, "evaluation", sampling)] if copies else []),
        ExpectedStage(MATCHING, "matching", matching),
        *evaluating(AFTER, sizes, ours),
    ]
