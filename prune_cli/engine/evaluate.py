"""Perplexity and distance to a dense model, with one block of weights in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from calibration.batch import Batch
from calibration.statistics import sum_dtype
from prune_cli.engine.activation_budget import Batching
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.ranks.ranks import ALONE, Ranks
from prune_cli.report.comparison import Comparison
from prune_cli.report.types import Evaluation

PROTOCOL = (
    "perplexity = exp(mean over windows of a window's mean next-token loss in nats); each window is predicted on its "
    "own and its first token is not predicted"
)
STATES_PER_TOKEN = 3


def evaluate(
    model: StreamedModel, windows: Batch, batching: Batching, progress: Progress, ranks: Ranks = ALONE
) -> Evaluation:
    """Perplexity on `windows`, shared out among `ranks`. Raises PruneError where the loss is not finite."""
    return summary(losses_of_windows(model, windows, batching, progress, ranks), windows)


def losses_of_windows(
    model: StreamedModel, windows: Batch, batching: Batching, progress: Progress, ranks: Ranks = ALONE
) -> list[float]:
    """The mean loss of each of `windows`, in nats."""
    losses: list[float] = []
    for batches in grouped_batches(model, windows, batching):
        with before_the_head(model, batches, progress, ranks) as stream:
            losses += window_losses(stream)
    return losses


def window_losses(stream: Stream) -> list[float]:
    """The mean loss of every window, in nats, of the batches of all ranks that wait behind the last block."""
    return stream.ranks.in_order(
        _on_host(
            _losses(*_logits(output.logits, batch, row)).mean()
            for batch, output in zip(stream.batches, stream.finish(), strict=True)
            for row in range(len(batch))
        )
    )


def _on_host(figures: Iterable[torch.Tensor]) -> list[Any]:
    """All at once, once all are computed: each by itself would have the device wait."""
    found = list(figures)
    return torch.stack(found).tolist() if found else []


def compare(
    model: StreamedModel,
    dense: StreamedModel,
    windows: Batch,
    batching: Batching,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Both models on `windows`, in step. Raises PruneError where a loss is not finite."""
    figures: list[list[float]] = []
    for batches in grouped_batches(model, windows, batching):
        with (
            before_the_head(model, batches, progress, ranks) as a,
            before_the_head(dense, batches, progress, ranks) as b,
        ):
            figures += ranks.in_order(
                _on_host(
                    _compared(_logits(mine.logits, batch, row), _logits(other.logits, batch, row)[0])
                    for batch, mine, other in zip(a.batches, a.finish(), b.finish(), strict=True)
                    for row in range(len(batch))
                )
            )
    ours, theirs, divergence, agreement = (list(each) for each in zip(*figures, strict=True))
    increases = by_tokens([mine - other for mine, other in zip(ours, theirs, strict=True)], [windows])
    return Comparison(
        model=summary(ours, windows),
        dense=summary(theirs, windows),
        loss_increase=mean(increases),
        loss_increase_standard_error=standard_error(increases),
        kl_from_dense=mean(by_tokens(divergence, [windows])),
        top1_agreement=mean(by_tokens(agreement, [windows])),
    )


def _compared(mine: tuple[torch.Tensor, torch.Tensor], reference: torch.Tensor) -> torch.Tensor:
    """(4,), of one window: both mean losses, the divergence and the agreement of the predictions."""
    pruned, targets = mine
    agreed = (pruned.argmax(-1) == reference.argmax(-1)).to(sum_dtype(pruned.device))
    each = (_losses(pruned, targets), _losses(reference, targets), _kl(reference, pruned), agreed)
    return torch.stack([values.mean() for values in each])


def grouped_batches(model: StreamedModel, windows: Batch, batching: Batching) -> Iterator[Sequence[Batch]]:
    """Batches that travel together: as many as their hidden states allow."""
    window_bytes = windows.length * model.hidden_size * model.dtype.itemsize * STATES_PER_TOKEN
    together = max(1, batching.together // (window_bytes * batching.size)) * batching.size
    for group in windows.split(together):
        yield group.split(batching.size)


def passes_of(model: StreamedModel, windows: Batch, batching: Batching) -> int:
    """How often the blocks are read for `windows`: once for each of `grouped_batches`."""
    return sum(1 for _ in grouped_batches(model, windows, batching))


@contextmanager
def before_the_head(
    model: StreamedModel, batches: Sequence[Batch], progress: Progress, ranks: Ranks = ALONE
) -> Iterator[Stream]:
    """All batches brought through all blocks, waiting before what comes after them."""
    with Stream(model, batches, ranks=ranks) as stream:
        for block in range(len(model.blocks)):
            stream.load(block)
            stream.run_block(block)
            stream.unload(block)
            progress.advance()
        yield stream


def _logits(logits: torch.Tensor, batch: Batch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The predictions (tokens - 1, vocabulary) of one window in float32, and the tokens that came."""
    tokens = batch.lengths[row]
    return logits[row, : tokens - 1].float(), batch.ids[row, 1:tokens].to(logits.device)


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").to(sum_dtype(logits.device))


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).to(sum_dtype(logits.device))


def summary(losses: Sequence[float], windows: Batch) -> Evaluation:
    """What the mean losses of `windows` say together. Raises PruneError where one is not finite."""
    loss = mean(by_tokens(losses, [windows]))
    if not math.isfinite(loss):
        raise PruneError("The loss is not finite: the forward pass overflows; try --dtype float32.")
    return Evaluation(
        perplexity=math.exp(min(loss, 700.0)),
        loss=loss,
        loss_standard_error=_standard_error_of_loss(losses, loss, windows),
        windows=len(windows),
        predicted_tokens=windows.tokens - len(windows),
    )


def _standard_error_of_loss(losses: Sequence[float], loss: float, windows: Batch) -> float:
    """Of a ratio of two sums, losses and tokens, where windows differ in length."""
    if windows.mask is None:
        return standard_error(losses)
    return standard_error(by_tokens([each - loss for each in losses], [windows]))


def by_tokens(values: Sequence[float], batches: Iterable[Batch]) -> list[float]:
    """`values` of the windows of `batches`, scaled so that their mean is that over predicted tokens.

    They stay as they are where all windows are of one length.
    """
    counts = [length - 1 for batch in batches for length in batch.lengths]
    if len(set(counts)) < 2:
        return list(values)
    usual = sum(counts) / len(counts)
    return [value * count / usual for value, count in zip(values, counts, strict=True)]


def mean(values: Sequence[float]) -> float:
    """Summed exactly."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single window, from which none can be told."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))
