"""Which of some continuations a model finds likeliest, by log-likelihood per byte; one block of weights in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibration.opening import find_opening
from calibration.token_set import tokenise
from prune_cli.engine.activation_budget import Batching
from prune_cli.engine.evaluate import before_the_head, grouped_batches
from prune_cli.engine.generate import padded
from prune_cli.evaluation.builtin_task import Item
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress


def answered_right(
    model: StreamedModel, tokenizer: Any, items: Sequence[Item], batching: Batching, progress: Progress
) -> list[bool]:
    """For each item whether its answer has the highest log-likelihood per byte of all choices."""
    rows = [_row(model, tokenizer, item.context, choice) for item in items for choice in item.choices]
    scores = _log_likelihoods(model, rows, batching, progress)
    right, first = [], 0
    for item in items:
        own = [score / len(c.encode()) for score, c in zip(scores[first:], item.choices, strict=False)]
        right.append(max(range(len(own)), key=own.__getitem__) == item.answer)
        first += len(item.choices)
    return right


def _row(model: StreamedModel, tokenizer: Any, context: str, choice: str) -> tuple[list[int], int]:
    """Ids of both, the context's beginning left out where the model takes no more, and how many are the choice's."""
    opening = list(find_opening(tokenizer).ids)
    before = tokenise(tokenizer, context, special_tokens=False)
    whole = tokenise(tokenizer, context + choice, special_tokens=False)
    new = len(whole) - len(before)
    room = (model.position_limit or len(whole) + len(opening)) - len(opening)
    row = [*opening, *whole[-room:]]
    return row, min(new, len(row) - 1)


def _log_likelihoods(
    model: StreamedModel, rows: Sequence[tuple[list[int], int]], batching: Batching, progress: Progress
) -> list[float]:
    """The sum over the last ids of each row, as many as it says, in nats."""
    windows = padded([ids for ids, _ in rows])
    found: list[float] = []
    for batches in grouped_batches(model, windows, batching):
        with before_the_head(model, batches, progress) as stream:
            for batch, output in zip(batches, stream.finish(), strict=True):
                for row, length in enumerate(batch.lengths):
                    new = rows[len(found)][1]
                    logits = output.logits[row, length - new - 1 : length - 1].float()
                    targets = batch.ids[row, length - new : length].to(logits.device)
                    chosen = logits.log_softmax(-1).gather(1, targets[:, None])
                    found.append(float(chosen.double().sum()))
    return found
