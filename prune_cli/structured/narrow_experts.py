"""Narrows the experts of one block: each loses channels of its own, as many as every other, by its own tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat

import torch

from methods.structured._units import Units
from methods.structured.width import Narrowed, Options, narrow, statistics_for
from prune_cli.checkpoint.stored_values import to_stored
from prune_cli.engine.expert_inputs import AtExperts, ExpertTokens, tokens_of_experts
from prune_cli.engine.input_statistics import InputStatistics
from prune_cli.errors import PruneError
from prune_cli.model.moe import before_down
from prune_cli.model.orientation import as_matrix, matrices, matrix_shape
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.structured.units import CoupledGroup


@dataclass
class ExpertNarrower:
    """The experts of `block` on their way from `tensors` (as stored, changed here) to narrower ones.

    `kept` are the units that stay, expert by expert; `errors` and `notes` by tensor.
    """

    model: StreamedModel
    block: int
    tensors: dict[str, torch.Tensor]
    group: CoupledGroup
    options: Options
    kept: list[torch.Tensor] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def run(self, here: AtExperts | None, dense: AtExperts | None) -> None:
        """Where the batches wait at the experts, or without any for scores of weights alone."""
        for _, info in self._infos():
            if info.expert is not None and info.expert.down and info.slices > 1 and here is not None:
                self.model.make_own(info)
        tokens = [] if here is None else tokens_of_experts(here, self.group.experts)
        aligned = dense if here is not None and here.every_token else None
        for expert in range(self.group.experts):
            gathered = None if here is None else self._statistics(expert, here, aligned, tokens[expert])
            self._narrow(expert, gathered)
            del gathered  # its Gram matrix goes before the next is summed

    def _infos(self) -> Iterator[tuple[str, TensorInfo]]:
        for name in self.group.slices:
            if self.group.blocks[name] == self.block:
                yield name, self.model.tensor_map[name]

    def _of(self, expert: int, *, down: bool) -> Iterator[str]:
        """The tensors with these matrices of `expert`."""
        for name, info in self._infos():
            if info.expert is not None and info.expert.down == down and info.expert.index in (None, expert):
                yield name

    def _matrix(self, name: str, expert: int) -> torch.Tensor:
        info, stored = self.model.tensor_map[name], self.tensors[name]
        one = matrices(info, stored)[expert] if info.slices > 1 else stored
        return as_matrix(info, one).to(self.model.device, torch.float32)

    def _narrow(self, expert: int, gathered: InputStatistics | None) -> None:
        (name,) = self._of(expert, down=True)
        bias_name = self._bias(name)
        statistics: dict[str, torch.Tensor] = {}
        weight = self._matrix(name, expert)
        if gathered is not None:
            statistics, weight = dict(gathered.values()), weight.to(gathered.device_of_sums)
        units = Units(weight, tuple(self._producers(expert, weight.device)))
        bias = None if bias_name is None else self.tensors[bias_name][expert].to(weight.device, torch.float32)
        self._check(name, statistics)
        try:
            found = narrow(units, bias, statistics, self.group.kept_in(self.block), self.options)
        except ValueError as error:
            raise PruneError(f"{name} cannot be fitted for expert {expert}: {error}") from error
        self._put(name, expert, weight, found, statistics)
        if bias_name is not None and found.bias is not None:
            bias = self.tensors[bias_name].clone()
            bias[expert] = to_stored(bias_name, found.bias, bias.dtype)
            self.tensors[bias_name] = bias
            self.changed.add(bias_name)
            self.model.set_weight(self.model.tensor_map[bias_name], bias)
        self.kept.append(found.kept.cpu())

    def _bias(self, down: str) -> str | None:
        wanted = f"{self.model.tensor_map[down].parameter}_bias"
        return next((name for name in self.tensors if self.model.tensor_map[name].parameter == wanted), None)

    def _producers(self, expert: int, device: torch.device) -> Iterator[torch.Tensor]:
        """(units, rows of a unit, hidden) of gate and up, as they are stored."""
        for name in self._of(expert, down=False):
            weight, begin, found, units = self._matrix(name, expert).to(device), 0, [], self.group.units
            for rows in self.group.slices[name].sections:
                found.append(weight[begin : begin + units * rows].view(units, rows, -1))
                begin += units * rows
            yield torch.cat(found, 1)

    def _statistics(
        self, expert: int, here: AtExperts, dense: AtExperts | None, tokens: ExpertTokens
    ) -> InputStatistics:
        (name,) = self._of(expert, down=True)
        needs, inputs = statistics_for(self.options), matrix_shape(self.model.tensor_map[name])[1]
        if tokens.notes:
            self.notes.setdefault(name, []).extend(tokens.notes)
        aligned, constant = dense if "gram" in needs else None, self._bias(name) is not None
        found = InputStatistics(needs, inputs, self.model.device, with_dense=aligned is not None, constant=constant)
        found.share(here.ranks, tokens.before)
        others = aligned.batches if aligned is not None else repeat(None)
        for batch, other, numbers in zip(here.batches, others, tokens.numbers, strict=False):
            if len(numbers):
                rows = before_down(here.module, expert, batch.hidden[numbers])
                beside = other and aligned and before_down(aligned.module, expert, other.hidden[numbers])
                found.add_rows(rows, beside)
        return found.combine()

    def _check(self, name: str, statistics: Mapping[str, torch.Tensor]) -> None:
        for key, value in statistics.items():
            if not bool(torch.isfinite(value).all()):
                raise PruneError(
                    f"The inputs of {name} are not finite ({key}): the forward pass overflows; try --dtype float32."
                )

    def _put(
        self, name: str, expert: int, before: torch.Tensor, found: Narrowed, statistics: Mapping[str, torch.Tensor]
    ) -> None:
        info = self.model.tensor_map[name]
        new = torch.zeros_like(before)
        new[:, found.kept] = found.weight
        if "gram" in statistics:
            gram = statistics["gram"][: before.shape[1], : before.shape[1]]
            error_sq, output_sq = (((w @ gram) * w).sum().item() for w in (before - new, before))
            error = max(0.0, error_sq / output_sq) if output_sq > 0 else 0.0
            self.errors[name] = self.errors.get(name, 0.0) + error / info.slices
        stored = to_stored(name, new.T if info.transposed else new, self.tensors[name].dtype).contiguous().cpu()
        if not self.model.model.get_parameter(info.parameter or "").is_meta:
            self.model.set_expert(info, expert, stored.to(self.model.device))
        if info.slices > 1:
            whole = self.tensors[name] if name in self.changed else self.tensors[name].clone()
            matrices(info, whole)[expert] = stored
            stored = whole
        self.tensors[name] = stored
        self.changed.add(name)
        if found.notes:
            self.notes.setdefault(name, []).extend(found.notes)
