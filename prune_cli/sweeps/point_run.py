"""One point on its way through the model: its batches, its copy of the block at hand, and what it lost in the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import torch

from calibration.tokens import TokenSet
from methods._pattern import Pattern, Unstructured
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.evaluate import window_losses
from prune_cli.engine.stream import Stream
from prune_cli.engine.texts import Texts
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.progress import Progress, Silent
from prune_cli.sweeps.request import Point
from prune_cli.unstructured.plan import pattern_of, plan_tensors
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.prune_block import BlockPruner, prune_block
from prune_cli.unstructured.prune_linear import PrunedLinear, Settings, prune_data_free


@dataclass(frozen=True)
class SweepTexts(Texts):
    """The tokens of a sweep, read once: `calibration` is None where no point needs it.

    `sampled` has those of points with --self-calibration, by its number, and `sensitivities` what the dense model's
    outputs showed on them, where a point needs it.
    """

    evaluation: TokenSet
    sampled: Mapping[int, TokenSet] = field(default_factory=dict)
    sensitivities: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def of(self, point: Point) -> TokenSet:
        """What `point` is calibrated on."""
        found = self.sampled.get(point.copies, self.calibration)
        assert found is not None
        return found


@dataclass(frozen=True)
class Measured:
    """What became of a point: the mean loss of every window, and the share of zeros among the pruned weights."""

    point: Point
    losses: tuple[float, ...]
    sparsity: float
    seconds: float


def plan_of(point: Point, base: PruningPlan, model: StreamedModel) -> PruningPlan:
    """What `prune` would have settled for this point. Raises RequestError where it cannot be pruned so."""
    pipeline = point.request.pipeline()
    pattern = pattern_of(point.request)
    decisions = plan_tensors(model, point.request, pipeline)
    return replace(base, request=point.request, model=model, pipeline=pipeline, pattern=pattern, decisions=decisions)


class PointRun:
    """A context in which the batches of one point stand between two blocks of a model of their own.

    For every block in order: `load`, then `prune` (or what the driver does with `pruner` and `calibration`), `evaluate`
    and `unload`; `finish` at the end. Weights are pruned in memory, as `prune` would have stored them.
    """

    def __init__(self, point: Point, base: PruningPlan, model: StreamedModel, texts: SweepTexts, folder: Path) -> None:
        self.point = point
        self.plan = plan_of(point, base, model)
        tokens = texts.of(point).windows.tokens if self.plan.pipeline.needs else 0
        self.settings = Settings(
            self.plan.pipeline,
            self._patterns(),
            point.request.seed,
            base.device,
            tokens,
            base.checkpoint,
            texts.sensitivities.get(point.copies, {}) if point.request.allocation == "sensitivity" else {},
        )
        self.follows_dense = point.request.target == "dense"
        self.calibration: Stream | None = None
        self._texts = texts
        self._folder = folder
        self._progress: Progress = Silent()
        self._batches = self.plan.batches(texts.evaluation.windows)
        self._rest = ActivationOffload(folder, base.budget)
        self._stack, self._early = ExitStack(), ExitStack()
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._zeros = self._weights = 0

    def _patterns(self) -> dict[str, Pattern]:
        names = self.plan.pruned_names()
        if self.point.allocation is not None:
            return {name: Unstructured(self.point.allocation[name]) for name in names}
        return dict.fromkeys(names, self.plan.pattern)

    def __enter__(self) -> PointRun:
        model = self.plan.model
        self.evaluation = self._stack.enter_context(
            Stream(model, self._batches, ActivationOffload(self._folder, self.plan.budget))
        )
        if self.plan.pipeline.needs:
            batches = self.plan.batches(self._texts.of(self.point).windows)
            # Left first, and before the end where no block is left to prune.
            self._stack.push(self._early)
            self.calibration = self._early.enter_context(
                Stream(model, batches, ActivationOffload(self._folder, self.plan.budget))
            )
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, value, trace)

    def infos(self, block: int) -> dict[str, TensorInfo]:
        """The tensors that this point prunes in a block."""
        return self.plan.pruned_infos(block) if self.point.block in (None, block) else {}

    def load(self, block: int) -> None:
        self._tensors = self.evaluation.load(block)

    def pruner(self, block: int) -> BlockPruner:
        assert self.calibration is not None
        return BlockPruner(self.calibration, self.infos(block), self._tensors, self.settings, self._progress)

    def prune(self, block: int) -> None:
        """Prune the loaded block by itself, without a dense stream beside it."""
        if self.calibration is None:
            self._prune_data_free(self.infos(block))
        elif not self.infos(block):
            self.calibration.run_block(block)
        else:
            pruner = self.pruner(block)
            prune_block([pruner], block, self.point.request.calibrate_by)
            self.count(pruner)

    def _prune_data_free(self, infos: Mapping[str, TensorInfo]) -> None:
        for name, info in infos.items():
            values, result = prune_data_free(info, self._tensors[name], self.settings)
            if info.expert is not None and info.expert.index is not None:
                self.plan.model.set_expert(info, info.expert.index, values)
            else:
                self.plan.model.set_weight(info, values)
            self._count(name, result)

    def count(self, pruner: BlockPruner) -> None:
        """Add the zeros of a block that is pruned; what no batch reached stayed dense."""
        for name, result in pruner.pruned.items():
            self._count(name, result)

    def _count(self, name: str, result: PrunedLinear) -> None:
        self._zeros += result.zeros
        self._weights += self.plan.model.tensor_map[name].entry.count

    def evaluate(self, block: int) -> None:
        self.evaluation.run_block(block)

    def unload(self, block: int) -> None:
        """The block is done; hidden states beyond some hundred MiB wait in files until the next."""
        self._tensors = {}
        self._rest.next_layer()
        for stream in (self.evaluation, self.calibration):
            for tensor in stream.waiting() if stream is not None else ():
                if tensor is not None:
                    self._rest.hold(tensor)
        self.evaluation.unload(block)
        if self.point.block == block and self.calibration is not None:
            self.calibration = None
            self._early.close()

    def finish(self, seconds: float) -> Measured:
        losses = tuple(window_losses(self.evaluation))
        self.plan.model.unload_embeddings()
        return Measured(self.point, losses, self._zeros / self._weights if self._weights else 0.0, seconds)
