"""The stages that every way of pruning has, with what each takes: the time left of a run, and what --dry-run tells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.eval_windows import likely_windows
from prune_cli.engine.generate import GENERATING, PROMPTS
from prune_cli.engine.open_model import OpenModel, given_tokens, usual_length
from prune_cli.engine.pace import Pace
from prune_cli.engine.perplexity import read_texts
from prune_cli.engine.texts import Texts
from prune_cli.progress import Silent
from prune_cli.time_left import ExpectedStage

# What a quick look does not see: other programs, caches, blocks unlike the first.
_FASTER, _SLOWER = 0.7, 1.6
_TOKENS_OF_A_PROMPT = 16
# Texts that take no network to read, so that a dry run may.
_NEAR = ("builtin", "files", "tokens")


@dataclass(frozen=True)
class Sizes:
    """Tokens: of the calibration text as `given` and with the `sampled` ones, and of the evaluation; 0 without."""

    given: int
    sampled: int
    evaluation: int

    @property
    def calibration(self) -> int:
        return self.given + self.sampled


@dataclass(frozen=True)
class Seconds:
    """How long a run may take, from `low` to `high`; `stages` has the middle of each by its title."""

    low: float
    high: float
    stages: dict[str, float]

    @classmethod
    def of(cls, stages: Sequence[ExpectedStage]) -> Seconds:
        by_title: defaultdict[str, float] = defaultdict(float)
        for stage in stages:
            by_title[stage.title] += stage.work
        middle = sum(by_title.values())
        return cls(_FASTER * middle, _SLOWER * middle, dict(by_title))


def sizes_of(opened: OpenModel, texts: Texts) -> Sizes:
    """Of texts that were read, before windows are sampled."""
    given = 0 if texts.calibration is None else texts.calibration.windows.tokens
    evaluation = 0 if texts.evaluation is None else texts.evaluation.windows.tokens
    return Sizes(given, given * opened.copies(given) if given else 0, evaluation)


def likely_sizes(opened: OpenModel) -> Sizes:
    """Before a run: of texts that are near by reading them, of others by what was asked for.

    Raises RequestError for a text that does not do.
    """
    texts = (opened.calibration, opened.evaluation)
    if all(text is None or text.kind in _NEAR for text in texts):
        return sizes_of(opened, read_texts(opened, Silent()))
    given, length = given_tokens(opened) or 0, usual_length(opened)
    evaluation = 0 if opened.evaluation is None else likely_windows(opened, given // length, length) * length
    return Sizes(given, given * opened.copies(given) if given else 0, evaluation)


def copying(checkpoint: Checkpoint, pace: Pace) -> ExpectedStage:
    return ExpectedStage(copying_title(checkpoint), "copying", checkpoint.nbytes * pace.copy)


def looking_at(checkpoint: Checkpoint, pace: Pace) -> ExpectedStage:
    return ExpectedStage("Looking at", "copying", checkpoint.nbytes * pace.copy / 2)


def copying_title(checkpoint: Checkpoint) -> str:
    return f"Copying {len(checkpoint.files)} file(s)"


def evaluating(title: str, sizes: Sizes, pace: Pace, share: float = 1.0) -> list[ExpectedStage]:
    """Of a model of which `share` of the blocks are left; none where nothing is evaluated."""
    work = sizes.evaluation * (share * pace.block + pace.head) + share * pace.load
    return [ExpectedStage(title, "evaluation", work)] if sizes.evaluation else []


def generating(opened: OpenModel, pace: Pace) -> list[ExpectedStage]:
    """A token of all prompts is a pass over the weights, of both models."""
    tokens = opened.request.generate
    if tokens is None:
        return []
    a_pass = pace.load + len(PROMPTS) * (_TOKENS_OF_A_PROMPT + tokens / 2) * pace.block
    return [ExpectedStage(GENERATING, "generation", 2 * tokens * a_pass)]
