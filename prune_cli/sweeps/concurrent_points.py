"""Takes several points through the model side by side: each block is read once for all of them.

What the maps of a point see depends on everything that was pruned before, so points share no statistics. They share
what is the same for all: the tokens, the reading of the block, and the dense model that `--target dense` follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.stream import Stream
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.sweeps.point_run import Measured, PointRun, SweepTexts
from prune_cli.sweeps.request import Point
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.prune_block import prune_block


class Worker:
    """A device with the models that points go through: made once, their weights come and go."""

    def __init__(self, plan: PruningPlan, models: int) -> None:
        self.plan = plan
        checkpoint = plan.checkpoint.reopened()
        self.models: list[StreamedModel] = [plan.with_checkpoint(checkpoint) for _ in range(models)]


@torch.no_grad()
def measure_concurrently(
    points: Sequence[Point],
    worker: Worker,
    texts: SweepTexts,
    folder: Path,
    progress: Progress,
    go_on: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Prune and evaluate `points`, each in one of the models, and one more for the dense model if a point follows it.

    Nothing is written but inputs that wait in files of `folder`. `go_on` is called at every block and may raise.
    """
    begun, plan = time.monotonic(), worker.plan
    with ExitStack() as stack:
        passages = [
            stack.enter_context(PointRun(point, plan, model, texts, folder))
            for point, model in zip(points, worker.models, strict=False)
        ]
        dense = _dense_stream(passages, worker, texts, folder, stack)
        for block in range(len(plan.model.blocks)):
            go_on()
            if dense is not None:
                _follow(passages, dense, block)
            for passage in passages:
                if not passage.follows_dense:
                    passage.load(block)
                    passage.prune(block)
                    passage.evaluate(block)
                    passage.unload(block)
            progress.advance(len(passages))
        seconds = (time.monotonic() - begun) / len(passages)
        return [passage.finish(seconds) for passage in passages]


def _dense_stream(
    passages: Sequence[PointRun], worker: Worker, texts: SweepTexts, folder: Path, stack: ExitStack
) -> Stream | None:
    first = next((passage for passage in passages if passage.follows_dense), None)
    if first is None:
        return None
    batches = worker.plan.batches(texts.of(first.point).windows)
    return stack.enter_context(Stream(worker.models[-1], batches, ActivationOffload(folder)))


def _follow(passages: Sequence[PointRun], dense: Stream, block: int) -> None:
    """Take those that follow the dense model through a block, side by side at every map."""
    followers = [passage for passage in passages if passage.follows_dense]
    dense.load(block)
    for passage in followers:
        passage.load(block)
    pruning = [passage for passage in followers if passage.infos(block)]
    if pruning:
        pruners = [passage.pruner(block) for passage in pruning]
        prune_block(pruners, block, dense=dense)
        for passage, pruner in zip(pruning, pruners, strict=True):
            passage.count(pruner)
    else:
        dense.run_block(block)
    for passage in followers:
        if passage not in pruning and passage.calibration is not None:
            passage.calibration.run_block(block)
        passage.evaluate(block)
        passage.unload(block)
    dense.unload(block)
