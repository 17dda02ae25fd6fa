"""Narrows one block while the batches pass through it: the model keeps its shapes, with zeros where units go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from methods._gram import dense_target, follows_dense
from methods.structured._units import Units, inputs_of
from methods.structured.width import Options, fitted, narrow, statistics_for
from prune_cli.checkpoint.stored_values import to_stored
from prune_cli.engine.expert_inputs import AtExperts, at_experts
from prune_cli.engine.input_statistics import InputStatistics
from prune_cli.engine.residual_drift import residual_drift, residual_factors, wanted_outputs
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError
from prune_cli.model.orientation import as_matrix
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.structured.narrow_experts import ExpertNarrower
from prune_cli.structured.units import CoupledGroup


@dataclass
class NarrowedBlock:
    """`tensors`: what changed, as stored in the output; `kept`: part -> the units that stay; errors by tensor.

    `makes_up`: whether linear layers of the block also make up for what the residual stream has lost before it.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    makes_up: bool = False


def layers_and_biases(model: StreamedModel, block: int, layers: Sequence[str]) -> list[str]:
    """The tensors of `block` that change when `layers` are fitted."""
    modules = {model.tensor_map[name].module_name for name in layers}
    return [
        name
        for name in model.block_names(block)
        for info in [model.tensor_map[name]]
        if info.parameter and info.module_name in modules and info.role in ("linear map", "bias")
    ]


class BlockNarrower:
    """One block on its way from `tensors` (as stored) to a narrower one, each of `parts` as `options` say."""

    def __init__(
        self,
        model: StreamedModel,
        block: int,
        tensors: Mapping[str, torch.Tensor],
        groups: Sequence[CoupledGroup],
        options: Options,
    ) -> None:
        self._model = model
        self._block = block
        self._tensors = dict(tensors)
        here = [group for group in groups if block in group.consumers]
        self._parts = {group.consumers[block]: group for group in here if group.name != "experts"}
        self._experts = {group.consumers[block]: group for group in here if group.name == "experts"}
        self._options = options
        self._shared: InputStatistics | None = None
        self._shared_as: tuple[object, ...] = ()
        self.result = NarrowedBlock()

    def run(self, stream: Stream, dense: Stream | None) -> NarrowedBlock:
        """Let all batches pass; raises PruneError naming the tensor that cannot be fitted."""
        names = self._model.linear_layers(self._block) if self._options.refit == "all" else list(self._parts)
        names = [*names, *self._experts]
        mixtures = {_module_of(self._model, name): group for name, group in self._experts.items()}
        with ExitStack() as stack:
            drift, stops = None, [stream.pause_at(self._block, names)]
            if dense is not None:
                layers = dense.model.linear_layers(self._block)
                factors = dense.ranks.on_first(lambda: residual_factors(dense, self._block, layers))
                self.result.makes_up = bool(factors)
                drift = stack.enter_context(residual_drift(stream, dense, factors))
                stops.append(dense.pause_at(self._block, names))
            for arrived in zip(*stops, strict=True):
                name, inputs = arrived[0]
                if name in mixtures:
                    beside = at_experts(dense, name) if dense is not None else None
                    self._narrow_experts(mixtures[name], at_experts(stream, name), beside)
                    continue
                lost = drift.at(name, len(inputs)) if drift is not None else None
                lost = lost if stream.ranks.all_agree(lost is not None) else None
                self._serve(name, stream, inputs, arrived[1][1] if dense is not None else None, lost)
        self._cut_the_rest()
        return self.result

    def run_data_free(self) -> NarrowedBlock:
        """For scores of weights alone, where nothing is fitted: no batch is needed."""
        for name in self._parts:
            info = self._model.tensor_map[name]
            self._narrow(name, self._matrix(info), None, None, {})
        for group in self._experts.values():
            self._narrow_experts(group, None, None)
        self._cut_the_rest()
        return self.result

    def _narrow_experts(self, group: CoupledGroup, here: AtExperts | None, dense: AtExperts | None) -> None:
        narrower = ExpertNarrower(self._model, self._block, self._tensors, group, self._options)
        narrower.run(here, dense)
        self.result.tensors |= {name: self._tensors[name] for name in narrower.changed}
        self.result.kept[group.name] = torch.stack(narrower.kept)
        self.result.errors |= narrower.errors
        self.result.notes |= narrower.notes

    def _serve(
        self,
        name: str,
        stream: Stream,
        inputs: Sequence[torch.Tensor],
        dense: Sequence[torch.Tensor] | None,
        lost: Sequence[torch.Tensor] | None,
    ) -> None:
        info = self._model.tensor_map[name]
        weight = self._matrix(info)
        bias_name = self._bias_of(info)
        needs = statistics_for(self._options) if name in self._parts else ("gram",)
        bias = None if bias_name is None else self._tensors[bias_name].to(self._model.device, torch.float32)
        with_dense = dense is not None and "gram" in needs and lost is None
        shared_as = (needs, bias_name is not None, with_dense)
        if not stream.shares_inputs() or self._shared is None or self._shared_as != shared_as:
            self._shared_as = shared_as
            self._shared = InputStatistics(
                needs, weight.shape[1], self._model.device, with_dense=with_dense, constant=bias_name is not None
            )
            self._shared.share(stream.ranks, stream.tokens_before)
            self._shared.add_batches(inputs, dense if with_dense else None, stream.here())
            self._shared.combine()
        statistics = dict(self._shared.values())
        if dense is not None and lost is not None and "gram" in statistics:
            wanted = wanted_outputs(weight, bias, dense, lost, stream.here())
            total = self._shared.output_cross(len(weight), wanted, inputs, stream.here())
            statistics["output_cross"] = total.value()
        self._check(name, statistics)
        weight = weight.to(self._shared.device_of_sums)
        bias = None if bias is None else bias.to(self._shared.device_of_sums)
        try:
            if name in self._parts:
                self._narrow(name, weight, bias, bias_name, statistics)
            else:
                self._fit(name, weight, bias, bias_name, statistics)
        except ValueError as error:
            raise PruneError(f"{name} cannot be fitted: {error}") from error

    def _matrix(self, info: TensorInfo) -> torch.Tensor:
        return as_matrix(info, self._tensors[info.entry.name]).to(self._model.device, torch.float32)

    def _bias_of(self, info: TensorInfo) -> str | None:
        """The bias of the linear layer that `place` is the weight of, where the checkpoint has one."""
        wanted = f"{info.module_name}.bias"
        return next((name for name in self._tensors if self._model.tensor_map[name].parameter == wanted), None)

    def _check(self, name: str, statistics: Mapping[str, torch.Tensor]) -> None:
        for key, value in statistics.items():
            if not bool(torch.isfinite(value).all()):
                raise PruneError(
                    f"The inputs of {name} are not finite ({key}): the forward pass overflows; try --dtype float32."
                )

    def _narrow(
        self,
        name: str,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        bias_name: str | None,
        statistics: dict[str, torch.Tensor],
    ) -> None:
        group = self._parts[name]
        made_by = group.producers(self._block, self._model.tensor_map)
        producers = tuple(self._producer(group, each).to(weight.device) for each in made_by)
        found = narrow(
            Units(weight, producers, group.width), bias, statistics, group.kept_in(self._block), self._options
        )
        columns = inputs_of(found.kept, group.width)
        output_sq = torch.zeros_like(weight)
        output_sq[:, columns] = found.weight
        self._measure(name, weight, output_sq, statistics)
        self._put(name, output_sq)
        if bias_name is not None and found.bias is not None:
            self._put(bias_name, found.bias)
        self.result.kept[group.name] = found.kept.cpu()
        if found.notes:
            self.result.notes[name] = list(found.notes)

    def _producer(self, group: CoupledGroup, name: str) -> torch.Tensor:
        """(units, rows of a unit, hidden)."""
        weight = self._matrix(self._model.tensor_map[name])
        begin, found = 0, []
        for rows in group.slices[name].sections:
            found.append(weight[begin : begin + group.units * rows].view(group.units, rows, -1))
            begin += group.units * rows
        return torch.cat(found, 1)

    def _fit(
        self,
        name: str,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        bias_name: str | None,
        statistics: dict[str, torch.Tensor],
    ) -> None:
        """A linear layer that keeps its inputs is fitted to what the dense one gave, which its inputs no longer do."""
        if not follows_dense(statistics):
            return
        with_bias = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        target = dense_target(with_bias, statistics, self._options.alpha)
        columns = torch.arange(with_bias.shape[1], device=with_bias.device)
        new, notes = fitted(with_bias, statistics["gram"], target, columns, self._options)
        self._measure(name, weight, new[:, : weight.shape[1]], statistics)
        self._put(name, new[:, : weight.shape[1]])
        if bias_name is not None:
            self._put(bias_name, new[:, -1])
        if notes:
            self.result.notes[name] = list(notes)

    def _measure(
        self, name: str, weight: torch.Tensor, new: torch.Tensor, statistics: Mapping[str, torch.Tensor]
    ) -> None:
        """||X(W-W')^T||^2 / ||XW^T||^2, from the Gram matrix, without the bias."""
        if "gram" in statistics:
            gram = statistics["gram"][: weight.shape[1], : weight.shape[1]]
            error_sq, output_sq = (((w @ gram) * w).sum().item() for w in (weight - new, weight))
            self.result.errors[name] = max(0.0, error_sq / output_sq) if output_sq > 0 else 0.0

    def _put(self, name: str, value: torch.Tensor) -> None:
        """Into the model, and as stored; a matrix comes as (out, in)."""
        info = self._model.tensor_map[name]
        oriented = value.T if info.transposed else value
        stored = to_stored(name, oriented, self._tensors[name].dtype).reshape(info.entry.shape).contiguous()
        self._model.set_weight(info, stored)
        self._tensors[name] = stored.cpu()
        self.result.tensors[name] = self._tensors[name]

    def _cut_the_rest(self) -> None:
        """Take the rows of units that went out of every tensor that carries them."""
        for group in (*self._parts.values(), *self._experts.values()):
            kept = self.result.kept.get(group.name)
            if kept is None:
                raise PruneError(
                    f"No calibration input reached {group.consumers[self._block]}, so its units cannot be chosen: "
                    "use other text."
                )
            for name, cut in group.slices.items():
                if group.blocks[name] == self._block:
                    self._tensors[name] = cut.apply(self._tensors[name], kept, group.units)
                    self.result.tensors[name] = self._tensors[name]


def _module_of(model: StreamedModel, name: str) -> str:
    """What computes with the experts' tensor `name`."""
    part = model.tensor_map[name].expert
    assert part is not None
    return part.module
