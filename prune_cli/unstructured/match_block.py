"""--match-blocks: once a block is pruned, and before the batches pass it, all that it kept is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from methods._block_matching import Matched
from prune_cli.engine.run_context import Run
from prune_cli.engine.stream import Stream
from prune_cli.errors import RequestError
from prune_cli.recovery.match_blocks import (
    BlockTrainer,
    Matching,
    Samples,
    held_out_of,
    pass_trained,
    samples_per_step,
    states_behind,
)
from prune_cli.recovery.request import EPOCHS, RATE
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.prune_block import BlockPruner


@dataclass(frozen=True)
class MatchedBlock:
    """The new values of a block's tensors, as stored, and what the training came to."""

    tensors: Mapping[str, torch.Tensor]
    result: Matched


def matching_samples(run: Run[PruningPlan]) -> Samples:
    """All calibration windows in batches of one step; with a sample that is held out, those sampled from it are.

    Raises RequestError for a single sample.
    """
    windows = run.calibration.windows
    given = len(windows) // (1 + run.calibration.copies)
    if given < 2:
        raise RequestError(
            f"{run.calibration.source} gives one sample, but --match-blocks needs at least 2, of which one is held "
            "out: give more text or a smaller --seq-len."
        )
    fitted = given - held_out_of(given)
    size = samples_per_step(run.request.batch_size, windows.length)
    parts = [windows[first : first + given] for first in range(0, len(windows), given)]
    return Samples(
        fit=[batch for part in parts for batch in part[:fitted].split(size)],
        held_out=parts[0][fitted:].split(size),
        beside=[batch for part in parts[1:] for batch in part[fitted:].split(size)],
    )


def match_block(
    run: Run[PruningPlan], samples: Samples, block: int, streams: tuple[Stream, Stream], pruner: BlockPruner
) -> MatchedBlock:
    """Train `block`, before which both streams wait: the pruned model's and the dense one's; then they pass it.

    Raises PruneError as `BlockTrainer.train` does.
    """
    stream, dense = streams
    model = stream.model
    targets = states_behind(dense, block)
    pruned = {name: result.stored for name, result in pruner.pruned.items()}
    tensors = {name: pruned.get(name, tensor) for name, tensor in pruner.tensors.items()}
    trainer = BlockTrainer(model, samples, Matching.of(EPOCHS, RATE, run.request.seed))
    matched, new = trainer.train(block, tensors, stream.calls(), targets)
    pass_trained(stream, block, {**pruned, **new})
    return MatchedBlock(new, matched)
