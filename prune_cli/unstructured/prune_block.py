"""Prunes the maps of one block while the batches pass through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch

from calibration.batch import Batch
from prune_cli.engine.expert_inputs import AtExperts, at_experts, experts_by_module
from prune_cli.engine.input_statistics import InputStatistics
from prune_cli.engine.lockstep import SameInputs
from prune_cli.engine.residual_drift import residual_drift, residual_factors
from prune_cli.engine.stream import Stream
from prune_cli.model.moe import Routed
from prune_cli.model.orientation import matrix_shape
from prune_cli.progress import Progress
from prune_cli.unstructured.plan import ROLES_WITH_INPUTS
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.prune_experts import ExpertsPruner
from prune_cli.unstructured.prune_linear import PrunedLinear, Settings, prune_linear


class BlockPruner:
    """The tensors of one block (or of what lies outside the blocks) that are to be pruned, and what became of them."""

    def __init__(
        self,
        job: PruningPlan,
        tensors: Mapping[str, torch.Tensor],
        names: Sequence[str],
        settings: Settings,
        tokens: int,
        progress: Progress,
    ) -> None:
        infos = {name: job.decisions[name].info for name in names}
        self._model = job.model
        self._experts = experts_by_module(infos)
        self._maps = {name: info for name, info in infos.items() if info.role == "linear map"}
        self._data_free = {name: info for name, info in infos.items() if info.role not in ROLES_WITH_INPUTS}
        self._heads = {name: info for name, info in infos.items() if info.role == "output head"}
        self._infos = infos
        self._tensors = tensors
        self._settings = settings
        self._tokens = tokens
        self._progress = progress
        self._same_inputs = SameInputs()
        self._statistics: InputStatistics | None = None
        self._observed: dict[str, InputStatistics] = {}
        self._routed: dict[str, list[Routed]] = {name: [] for name in self._experts}
        self.pruned: dict[str, PrunedLinear] = {}

    @property
    def unreached(self) -> list[str]:
        """Maps that no batch called (some models multiply by a weight without calling its module): they stay dense."""
        return [name for name in self._infos if name not in self.pruned]

    def run(self, stream: Stream, block: int) -> None:
        """Single pass: a map is pruned when all batches wait at it, so its inputs come from maps already pruned."""
        self._prune_data_free()
        for name, inputs in stream.pause_at(block, self._stops):
            if name in self._experts:
                self._serve_experts(name, at_experts(stream, name))
            else:
                self._serve(name, stream, inputs)

    def run_twice(self, stream: Stream, block: int) -> None:
        """The authors' protocol: all statistics come from the dense block, then the pruned block makes the outputs."""
        stream.observe_block(block, self._stops, lambda name, tensors: self._observe(name, tensors, stream.passing()))
        for name, statistics in self._observed.items():
            self._prune(name, statistics)
        for name, routed in self._routed.items():
            self._serve_experts(name, AtExperts(stream.model.model.get_submodule(name), routed), at_once=True)
        self._prune_data_free()
        stream.run_block(block)

    def run_outside_blocks(self, stream: Stream) -> None:
        """Prune what lies outside the blocks; the batches end at the output head if it is among them."""
        self._prune_data_free()
        for name in self._heads:
            self._serve(name, stream, stream.stop_at_head(name))

    @property
    def _stops(self) -> list[str]:
        """Where batches wait: at every map, and once at the experts, for one of their tensors."""
        return [*self._maps, *(next(iter(infos)) for infos in self._experts.values())]

    def _serve_experts(
        self, module: str, here: AtExperts, dense: AtExperts | None = None, *, at_once: bool = False
    ) -> None:
        pruner = ExpertsPruner(self._model, self._experts[module], self._tensors, self._settings)
        for name, result in pruner.prune(here, dense, at_once=at_once).items():
            self.pruned[name] = result
            self._progress.advance()

    def _prune_data_free(self) -> None:
        """Tensors that have no inputs (norms, biases, tables), for methods that need none."""
        for name, info in self._data_free.items():
            self._finish(name, prune_linear(info, self._tensors[name], self._settings, {}, None))

    def _new_statistics(self, name: str, *, with_dense: bool = False) -> InputStatistics:
        inputs = matrix_shape(self._infos[name])[1]
        settings = self._settings
        return InputStatistics(
            settings.pipeline.needs, inputs, settings.device, with_dense=with_dense, sketch_of=self._tokens
        )

    def _serve(
        self,
        name: str,
        stream: Stream,
        inputs: Sequence[torch.Tensor],
        dense: Sequence[torch.Tensor] | None = None,
        error_sq: Sequence[torch.Tensor] | None = None,
    ) -> None:
        if not self._same_inputs.repeated(inputs) or self._statistics is None:
            self._statistics = self._new_statistics(name, with_dense=dense is not None)
            self._statistics.add_batches(inputs, dense, stream.here())
        lost = {}
        if error_sq is not None:
            lost["drift"] = self._statistics.drift(error_sq, inputs, stream.here()).value()
        self._prune(name, self._statistics, lost)

    def _observe(self, name: str, arguments: list[torch.Tensor], batch: Batch) -> None:
        if name in self._experts:
            self._routed[name].append(Routed.of(self._model.model.get_submodule(name), arguments, batch.mask))
            return
        tensor = arguments[0]
        shared = self._same_inputs.repeated([tensor])
        if name not in self._observed:
            last = next(reversed(self._observed.values()), None) if shared else None
            self._observed[name] = last if last is not None else self._new_statistics(name)
        if not shared:
            self._observed[name].add(tensor, None, batch)

    def _prune(self, name: str, statistics: InputStatistics, own: Mapping[str, torch.Tensor] | None = None) -> None:
        """`own` statistics are of this map alone, the others of all that share its inputs."""
        values = {**statistics.values(), **(own or {})}
        result = prune_linear(self._infos[name], self._tensors[name], self._settings, values, statistics.rows())
        self._finish(name, result)

    def _finish(self, name: str, result: PrunedLinear) -> None:
        self._model.set_weight(self._infos[name], result.stored)
        self.pruned[name] = result
        self._progress.advance()


def run_beside_dense(pruners: Sequence[BlockPruner], streams: Sequence[Stream], dense: Stream, block: int) -> None:
    """Like `BlockPruner.run`, with the dense model's inputs of the same map at hand.

    Several models, each with its pruner and stream, may go beside one dense stream: what they prune is called the same.
    """
    names = pruners[0]._stops
    factors = residual_factors(dense, block, dense.model.linear_maps(block))
    with ExitStack() as stack:
        drifts = [stack.enter_context(residual_drift(stream, dense, factors)) for stream in streams]
        for pruner in pruners:
            pruner._prune_data_free()
        stops = [stream.pause_at(block, names) for stream in (*streams, dense)]
        for *arrived, (same, others) in zip(*stops, strict=True):
            for pruner, stream, drift, (name, inputs) in zip(pruners, streams, drifts, arrived, strict=True):
                assert name == same
                if name in pruner._experts:
                    pruner._serve_experts(name, at_experts(stream, name), at_experts(dense, name))
                else:
                    pruner._serve(name, stream, inputs, others, drift.at(name, len(inputs)))
