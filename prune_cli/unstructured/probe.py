"""What pruning costs on this machine: one block pruned on random tokens, layers too large for a quick look in part."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from methods._pattern import NofM
from prune_cli.engine.pace import Pace, measured_pace, probe_windows, seconds_of
from prune_cli.engine.stream import Stream
from prune_cli.model.orientation import as_matrix, matrix_shape
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.progress import Silent
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.prune_block import BlockPruner, prune_block
from prune_cli.unstructured.prune_linear import LinearInputs, Settings, prune_data_free, squares
from prune_cli.unstructured.stages import PruningPace

# Of two batches, for what is done once a block is not taken for the work of each.
_BATCHES = 2
# A layer is solved for in so many rows and columns at most.
_MOST = 512


@dataclass
class Solving:
    """Seconds of a matrix by its shape, once measured, and of all so far."""

    by_shape: dict[tuple[int, int], float] = field(default_factory=dict)
    seconds: float = 0.0
    spent: float = 0.0


class TimedPruner(BlockPruner):
    """Solves for one matrix of each shape, in part where it is large, and leaves the weights as they are."""

    def __init__(
        self,
        stream: Stream,
        infos: Mapping[str, TensorInfo],
        tensors: Mapping[str, torch.Tensor],
        settings: Settings,
        solving: Solving,
    ) -> None:
        super().__init__(stream, infos, tensors, settings, Silent())
        self._solving = solving

    def prune(self, together: Sequence[LinearInputs]) -> None:
        begun = time.perf_counter()
        for each in together:
            shape = matrix_shape(each.info)
            if shape not in self._solving.by_shape:
                self._solving.by_shape[shape] = solving_seconds(each, self.stored(each), self.settings)
            self._solving.seconds += self._solving.by_shape[shape]
        self._solving.spent += time.perf_counter() - begun


def solving_seconds(inputs: LinearInputs, stored: torch.Tensor, settings: Settings) -> float:
    """Of the whole matrix: solvers grow with rows x inputs^2, scores with rows x inputs."""
    pipeline, pattern = settings.pipeline, settings.patterns[inputs.info.entry.name]
    whole = as_matrix(inputs.info, stored).to(settings.device, torch.float32)
    out, width = (min(_MOST, side) for side in whole.shape)
    if isinstance(pattern, NofM):
        width -= width % pattern.of
    weight = whole[:out, :width].contiguous()
    statistics = {name: _part(value, whole.shape, out, width) for name, value in inputs.statistics.items()}

    def prune() -> None:
        generator = torch.Generator().manual_seed(0)
        result = pipeline.method.prune(weight, statistics, pattern, pipeline.options, generator)
        for following in pipeline.steps:
            result = following.step.improve(weight, result, statistics, pattern, following.options)
        if inputs.rows is not None:
            squares(inputs.rows[:, :width], weight, result.weight)

    power = 2 if "gram" in pipeline.needs else 1
    return seconds_of(prune, settings.device) * (whole.shape[0] / out) * (whole.shape[1] / width) ** power


def _part(value: torch.Tensor, shape: torch.Size, out: int, width: int) -> torch.Tensor:
    """Of a statistic: (out, in), (in, in), (in,), or a number."""
    if value.ndim == 2:
        return value[: out if value.shape == shape else width, :width].contiguous()
    return value[:width] if value.ndim == 1 else value


@torch.no_grad()
def measured_pruning_pace(plan: PruningPlan) -> PruningPace:
    """Seconds are those of the first block that is pruned, times the weights that all have for each of its own."""
    model = measured_pace(plan)
    block = next((b for b in range(len(plan.model.blocks)) if plan.pruned_infos(b)), None)
    if block is None:
        return PruningPace(model, 0.0, 0.0)
    counts = [sum(info.entry.count for info in plan.pruned_infos(b).values()) for b in range(len(plan.model.blocks))]
    more = sum(info.entry.count for info in plan.pruned_infos().values()) / counts[block]
    if plan.pipeline.needs:
        statistics, solving = _of_block(plan, block, model, counts[block] / sum(counts))
    else:
        statistics, solving = 0.0, _data_free(plan, block)
    return PruningPace(model, statistics * more, solving * more)


def _data_free(plan: PruningPlan, block: int) -> float:
    infos, settings = plan.pruned_infos(block), _settings(plan, 0)
    tensors = {name: plan.checkpoint.read(name) for name in infos}
    return seconds_of(lambda: [prune_data_free(infos[name], tensors[name], settings) for name in infos], plan.device)


def _of_block(plan: PruningPlan, block: int, model: Pace, share: float) -> tuple[float, float]:
    """Seconds of a token's part in the statistics of the block, and of solving for its layers."""
    batches = [probe_windows(plan)] * _BATCHES
    tokens = sum(batch.tokens for batch in batches)
    models = [plan.model]
    if plan.request.target == "dense":
        models.append(plan.with_checkpoint(plan.checkpoint))
    solving = Solving()
    with ExitStack() as stack:
        stream, *beside = streams = [stack.enter_context(Stream(each, batches)) for each in models]
        for passed in range(block):
            for each in streams:
                each.load(passed)
                each.run_block(passed)
                each.unload(passed)
        tensors, *_ = [each.load(block) for each in streams]
        pruner = TimedPruner(stream, plan.pruned_infos(block), tensors, _settings(plan, tokens), solving)
        dense = beside[0] if beside else None
        took = seconds_of(lambda: prune_block([pruner], block, plan.request.calibrate_by, dense), plan.device)
    forward = (len(models) + (plan.request.calibrate_by == "block")) * model.block * share
    return max(0.0, (took - solving.spent) / tokens - forward), solving.seconds


def _settings(plan: PruningPlan, tokens: int) -> Settings:
    patterns = dict.fromkeys(plan.pruned_names(), plan.pattern)
    return Settings(plan.pipeline, patterns, plan.request.seed, plan.device, tokens)
