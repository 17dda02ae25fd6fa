"""Perplexity and distance to a dense model, with one block of weights in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from prune_cli.errors import PruneError
from prune_cli.model import Skeleton
from prune_cli.progress import Progress
from prune_cli.stream import Stream

PROTOCOL = (
    "perplexity = exp(mean over windows of a window's mean next-token loss in nats); each window is predicted on its "
    "own and its first token is not predicted"
)
# Hidden states of the windows on their way together; more windows mean another pass over the weights.
_GROUP_BYTES = 4 << 30
_STATES_PER_TOKEN = 3


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per predicted token, with the standard error of its mean over windows."""

    perplexity: float
    loss: float
    loss_standard_error: float
    windows: int
    predicted_tokens: int


@dataclass(frozen=True)
class Comparison:
    """A model against a dense one on the same windows: means over predicted tokens, differences in nats."""

    model: Evaluation
    dense: Evaluation
    loss_increase: float
    loss_increase_standard_error: float
    kl_from_dense: float
    top1_agreement: float


def evaluate(model: Skeleton, windows: torch.Tensor, batch_size: int, progress: Progress) -> Evaluation:
    """Perplexity on `windows` (windows, length). Raises PruneError where the loss is not finite."""
    return summary(losses_of_windows(model, windows, batch_size, progress), windows)


def losses_of_windows(model: Skeleton, windows: torch.Tensor, batch_size: int, progress: Progress) -> list[float]:
    """The mean loss of each of `windows` (windows, length), in nats."""
    losses: list[float] = []
    for batches in grouped_batches(model, windows, batch_size):
        with before_the_head(model, batches, progress) as stream:
            losses += window_losses(stream, batches)
    return losses


def window_losses(stream: Stream, batches: Sequence[torch.Tensor]) -> list[float]:
    """The mean loss of every window, in nats, of `batches` that wait behind the last block of `stream`."""
    return [
        float(_losses(*_logits(output.logits, ids, row)).mean())
        for ids, output in zip(batches, stream.finish(), strict=True)
        for row in range(len(ids))
    ]


def compare(model: Skeleton, dense: Skeleton, windows: torch.Tensor, batch_size: int, progress: Progress) -> Comparison:
    """Both models on `windows` (windows, length), in step. Raises PruneError where a loss is not finite."""
    ours: list[float] = []
    theirs: list[float] = []
    divergence: list[float] = []
    agreement: list[float] = []
    for batches in grouped_batches(model, windows, batch_size):
        with before_the_head(model, batches, progress) as a, before_the_head(dense, batches, progress) as b:
            for ids, mine, other in zip(batches, a.finish(), b.finish(), strict=True):
                for row in range(len(ids)):
                    pruned, targets = _logits(mine.logits, ids, row)
                    reference, _ = _logits(other.logits, ids, row)
                    ours.append(float(_losses(pruned, targets).mean()))
                    theirs.append(float(_losses(reference, targets).mean()))
                    divergence.append(float(_kl(reference, pruned).mean()))
                    agreement.append(float((pruned.argmax(-1) == reference.argmax(-1)).double().mean()))
    increases = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    return Comparison(
        model=summary(ours, windows),
        dense=summary(theirs, windows),
        loss_increase=mean(increases),
        loss_increase_standard_error=standard_error(increases),
        kl_from_dense=mean(divergence),
        top1_agreement=mean(agreement),
    )


def grouped_batches(model: Skeleton, windows: torch.Tensor, batch_size: int) -> Iterator[Sequence[torch.Tensor]]:
    """Batches that travel together: as many as their hidden states allow."""
    window_bytes = windows.shape[1] * model.hidden_size * model.dtype.itemsize * _STATES_PER_TOKEN
    together = max(1, _GROUP_BYTES // (window_bytes * batch_size)) * batch_size
    for group in windows.split(together):
        yield group.split(batch_size)


@contextmanager
def before_the_head(model: Skeleton, batches: Sequence[torch.Tensor], progress: Progress) -> Iterator[Stream]:
    """All batches brought through all blocks, waiting before what comes after them."""
    with Stream(model, batches) as stream:
        for block in range(len(model.blocks)):
            stream.load(block)
            stream.through(block)
            stream.unload(block)
            progress.advance()
        yield stream


def _logits(logits: torch.Tensor, ids: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The predictions (length - 1, vocabulary) of one window in float32, and the tokens that came."""
    return logits[row, :-1].float(), ids[row, 1:].to(logits.device)


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).double()


def summary(losses: Sequence[float], windows: torch.Tensor) -> Evaluation:
    """What the mean losses of `windows` (windows, length) say together. Raises PruneError where one is not finite."""
    loss = mean(losses)
    if not math.isfinite(loss):
        raise PruneError("The loss is not finite: the forward pass overflows; try --dtype float32.")
    return Evaluation(
        perplexity=math.exp(min(loss, 700.0)),
        loss=loss,
        loss_standard_error=standard_error(losses),
        windows=len(windows),
        predicted_tokens=len(windows) * (windows.shape[1] - 1),
    )


def mean(values: Sequence[float]) -> float:
    """Summed exactly."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single window, from which none can be told."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))
