"""One point on its way through the model: its batches, its copy of the block at hand, and what it lost in the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import torch

from calibration.batch import Batch
from calibration.tokens import TokenSet
from methods._pattern import Pattern, Unstructured
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.evaluate import window_losses
from prune_cli.engine.open_model import pick_batch_size
from prune_cli.engine.stream import Stream
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress, Silent
from prune_cli.sweep.request import Point
from prune_cli.unstructured.plan import pattern_of, plan_tensors
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.prune_block import BlockPruner
from prune_cli.unstructured.prune_linear import Settings, prune_linear


@dataclass(frozen=True)
class Texts:
    """The tokens of a sweep, read once: `calibration` is None where no point needs it.

    `sampled` has those of points with --self-calibration, by its number.
    """

    calibration: TokenSet | None
    evaluation: TokenSet
    sampled: Mapping[int, TokenSet] = field(default_factory=dict)

    def of(self, point: Point) -> TokenSet:
        """What `point` is calibrated on."""
        found = self.sampled.get(point.request.self_calibration, self.calibration)
        assert found is not None
        return found


@dataclass(frozen=True)
class Measured:
    """What became of a point: the mean loss of every window, and the share of zeros among the pruned weights."""

    point: Point
    losses: tuple[float, ...]
    sparsity: float
    seconds: float


def job_of(point: Point, base: PruningPlan, model: StreamedModel) -> PruningPlan:
    """What `prune` would have settled for this point. Raises RequestError where it cannot be pruned so."""
    pipeline = point.request.pipeline()
    pattern = pattern_of(point.request)
    decisions = plan_tensors(model, point.request, pipeline)
    return replace(base, model=model, pipeline=pipeline, pattern=pattern, decisions=decisions)


def batches_of(point: Point, job: PruningPlan, tokens: TokenSet) -> list[Batch]:
    return tokens.windows.split(pick_batch_size(point.request.batch_size, job.device, tokens.ids.shape[1]))


class PointRun:
    """A context in which the batches of one point stand between two blocks of a model of their own.

    For every block in order: `load`, then `prune` (or what the driver does with `pruner` and `calibration`), `evaluate`
    and `unload`; `finish` at the end. Weights are pruned in memory, as `prune` would have stored them.
    """

    def __init__(self, point: Point, base: PruningPlan, model: StreamedModel, texts: Texts, folder: Path) -> None:
        self.point = point
        self.job = job_of(point, base, model)
        self.settings = Settings(
            self.job.pipeline, self._patterns(), point.request.seed, base.device, base.checkpoint.rounded
        )
        self.follows_dense = point.request.target == "dense"
        self.calibration: Stream | None = None
        self._texts = texts
        self._folder = folder
        self._progress: Progress = Silent()
        self._batches = batches_of(point, self.job, texts.evaluation)
        self._rest = ActivationOffload(folder)
        self._stack, self._early = ExitStack(), ExitStack()
        self._tensors: dict[str, torch.Tensor] = {}
        self._zeros = self._weights = 0

    def _patterns(self) -> dict[str, Pattern]:
        names = self.job.pruned_names()
        if self.point.allocation is not None:
            return {name: Unstructured(self.point.allocation[name]) for name in names}
        return dict.fromkeys(names, self.job.pattern)

    def __enter__(self) -> PointRun:
        model = self.job.model
        self.evaluation = self._stack.enter_context(Stream(model, self._batches))
        if self.job.pipeline.needs:
            batches = batches_of(self.point, self.job, self._texts.of(self.point))
            # Left first, and before the end where no block is left to prune.
            self._stack.push(self._early)
            self.calibration = self._early.enter_context(Stream(model, batches, ActivationOffload(self._folder)))
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, value, trace)

    def names(self, block: int) -> list[str]:
        """The tensors that this point prunes in a block."""
        return self.job.pruned_names(block) if self.point.block in (None, block) else []

    def load(self, block: int) -> None:
        self._tensors = self.evaluation.load(block)

    def pruner(self, block: int) -> BlockPruner:
        tokens = self._texts.of(self.point).windows.tokens
        return BlockPruner(self.job, self._tensors, self.names(block), self.settings, tokens, self._progress)

    def prune(self, block: int) -> None:
        """Prune the loaded block by itself, without a dense stream beside it."""
        names = self.names(block)
        if self.calibration is None:
            self._prune_data_free(names)
        elif not names:
            self.calibration.run_block(block)
        else:
            pruner = self.pruner(block)
            if self.point.request.calibrate_by == "block":
                pruner.run_twice(self.calibration, block)
            else:
                pruner.run(self.calibration, block)
            self.count(pruner)

    def _prune_data_free(self, names: list[str]) -> None:
        for name in names:
            place = self.job.decisions[name].info
            stored = prune_linear(place, self._tensors[name], self.settings, {}, None).stored
            if place.expert is not None and place.expert.index is not None:
                self.job.model.set_expert(place, place.expert.index, stored)
            else:
                self.job.model.set_weight(place, stored)
            self._count(stored)

    def count(self, pruner: BlockPruner) -> None:
        """Add the zeros of a block that is pruned; what no batch reached stayed dense."""
        for result in pruner.pruned.values():
            self._count(result.stored)

    def _count(self, stored: torch.Tensor) -> None:
        self._zeros += int((stored == 0).count_nonzero())
        self._weights += stored.numel()

    def evaluate(self, block: int) -> None:
        self.evaluation.run_block(block)

    def unload(self, block: int) -> None:
        """The block is done; hidden states beyond some hundred MiB wait in files until the next."""
        self._tensors = {}
        self._rest.next_map()
        for stream in (self.evaluation, self.calibration):
            for tensor in stream.waiting() if stream is not None else ():
                if tensor is not None:
                    self._rest.hold(tensor)
        self.evaluation.unload(block)
        if self.point.block == block and self.calibration is not None:
            self.calibration = None
            self._early.close()

    def finish(self, seconds: float) -> Measured:
        losses = tuple(window_losses(self.evaluation, self._batches))
        self.job.model.unload_embeddings()
        return Measured(self.point, losses, self._zeros / self._weights if self._weights else 0.0, seconds)
