"""Takes several points through the model side by side: each block is read once for all of them.

What the layers of a point see depends on everything that was pruned before, so points share no statistics. They share
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
        point_runs = [
            stack.enter_context(PointRun(point, plan, model, texts, folder))
            for point, model in zip(points, worker.models, strict=False)
        ]
        dense = _dense_stream(point_runs, worker, texts, folder, stack)
        for block in range(len(plan.model.blocks)):
            go_on()
            if dense is not None:
                _follow(point_runs, dense, block)
            for point_run in point_runs:
                if not point_run.follows_dense:
                    point_run.load(block)
                    point_run.prune(block)
                    point_run.evaluate(block)
                    point_run.unload(block)
            progress.advance(len(point_runs))
        seconds = (time.monotonic() - begun) / len(point_runs)
        return [point_run.finish(seconds) for point_run in point_runs]


def _dense_stream(
    point_runs: Sequence[PointRun], worker: Worker, texts: SweepTexts, folder: Path, stack: ExitStack
) -> Stream | None:
    first = next((point_run for point_run in point_runs if point_run.follows_dense), None)
    if first is None:
        return None
    batches = worker.plan.batches(texts.of(first.point).windows)
    return stack.enter_context(Stream(worker.models[-1], batches, ActivationOffload(folder, worker.plan.budget)))


def _follow(point_runs: Sequence[PointRun], dense: Stream, block: int) -> None:
    """Take those that follow the dense model through a block, side by side at every linear layer."""
    followers = [point_run for point_run in point_runs if point_run.follows_dense]
    dense.load(block)
    for point_run in followers:
        point_run.load(block)
    pruning = [point_run for point_run in followers if point_run.infos(block)]
    if pruning:
        pruners = [point_run.pruner(block) for point_run in pruning]
        prune_block(pruners, block, dense=dense)
        for point_run, pruner in zip(pruning, pruners, strict=True):
            point_run.count(pruner)
    else:
        dense.run_block(block)
    for point_run in followers:
        if point_run not in pruning and point_run.calibration is not None:
            point_run.calibration.run_block(block)
        point_run.evaluate(block)
        point_run.unload(block)
    dense.unload(block)
