"""More calibration windows, which the dense model samples itself: fewer tokens are fitted too closely.

Each token of a new window is drawn from what the model predicts after the text before it (one forward pass for all
windows, no generation), so that new words come in the contexts of the given text. After Williams, Chrysostomou &
Aletras, Self-calibration for Language Model Quantization and Pruning, arXiv:2410.17170, who generate whole texts.
`auto` adds none where each input of the widest linear layer has ENOUGH tokens: nothing is gained (docs/quality.md).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from calibration.batch import Batch
from calibration.token_set import TokenSet, sha256_of
from prune_cli.engine.activation_budget import Batching
from prune_cli.engine.evaluate import before_the_head, grouped_batches, passes_of
from prune_cli.errors import PruneError, RequestError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress

SELF_CALIBRATION_PAPER = (
    "Williams, Chrysostomou & Aletras, Self-calibration for Language Model Quantization and Pruning, arXiv:2410.17170"
)

SAMPLING = "Sampling calibration windows"
ENOUGH = 16


def copies_for(tokens: int, inputs: int) -> int:
    """What `auto` is with `tokens` given ones: one window for each where `inputs` have fewer than ENOUGH.

    On a real model a second one gains nothing (docs/quality.md).
    """
    return int(tokens < ENOUGH * inputs)


def self_calibrated(
    tokens: TokenSet, copies: int, model: StreamedModel, batching: Batching, seed: int, progress: Progress
) -> TokenSet:
    """`tokens`, and after them `copies` more windows for each, sampled by the dense `model`.

    Raises RequestError for samples with images or the like: the places that these take cannot be sampled.
    """
    if copies == 0:
        return tokens
    if tokens.beside:
        raise RequestError(
            f"{tokens.source} holds more than tokens ({', '.join(tokens.beside[0])}), of which the model cannot sample "
            "more by itself: add --self-calibration 0."
        )
    given = tokens.windows
    progress.stage(SAMPLING, len(model.blocks) * passes_of(model, given, batching))
    ids = torch.cat([given.ids, sample_windows(model, given, copies, batching, seed, progress)])
    mask = None if given.mask is None else given.mask.repeat(1 + copies, 1)
    protocol = f"{tokens.protocol}; then {copies} of each, every token sampled by the dense model from the given text"
    sha256 = sha256_of(Batch(ids, mask))
    return replace(tokens, ids=ids, mask=mask, protocol=f"{protocol} before it", sha256=sha256, copies=copies)


@torch.no_grad()
def sample_windows(
    model: StreamedModel, windows: Batch, copies: int, batching: Batching, seed: int, progress: Progress
) -> torch.Tensor:
    """(copies x samples, length) ids for `windows` (samples, length); the first token of each and padding stay.

    Raises PruneError where the model's predictions are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    sampled = windows.ids.repeat(copies, 1, 1)
    window = 0
    for batches in grouped_batches(model, windows, batching):
        with before_the_head(model, batches, progress) as stream:
            for batch, output in zip(batches, stream.finish(), strict=True):
                for row in range(len(batch)):
                    sampled[:, window, 1:] = _draw(output.logits[row, :-1], copies, generator).T
                    window += 1
    if windows.mask is not None:
        sampled = torch.where(windows.mask, sampled, windows.ids)
    return sampled.flatten(0, 1)


def _draw(logits: torch.Tensor, copies: int, generator: torch.Generator) -> torch.Tensor:
    """(positions, copies) ids from `logits` (positions, vocabulary); drawn on the host, for one stream of numbers."""
    probabilities = logits.float().softmax(-1).cpu()
    if not bool(torch.isfinite(probabilities).all()):
        raise PruneError("The model's predictions are not finite: the forward pass overflows; try --dtype float32.")
    return torch.multinomial(probabilities, copies, replacement=True, generator=generator)
