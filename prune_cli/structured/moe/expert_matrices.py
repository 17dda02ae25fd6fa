"""The matrices of the experts of one block, as the checkpoint holds them and as the model computes with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prune_cli.model.orientation import as_matrix, as_stored, matrices
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo


class ExpertMatrices:
    """Of `block`, loaded as `tensors` (as stored): an expert's matrices are read as (out, in) and put back.

    What is put is computed with at once, rounded as the checkpoint will hold it; `tensors` has it then.
    """

    def __init__(self, model: StreamedModel, block: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)
        self.changed: set[str] = set()
        self._model = model
        self._names = [name for name in model.block_names(block) if model.tensor_map[name].expert is not None]
        self._own: set[str] = set()
        self._parameters: set[str] = set()

    def names(self, expert: int, *, down: bool) -> list[str]:
        """The tensors with the last matrix of `expert`, or with those before it."""
        return [
            name
            for name in self._names
            if (part := self._model.tensor_map[name].expert) and part.down == down and part.index in (None, expert)
        ]

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        """(out, in) float32, on the model's device."""
        info = self._model.tensor_map[name]
        return as_matrix(info, self._slice(info, self.tensors[name], expert)).to(self._model.device, torch.float32)

    def bias(self, name: str, expert: int) -> torch.Tensor | None:
        """(out,) float32 of the bias beside the matrices `name`, where there is one."""
        beside = self._bias_name(name)
        return None if beside is None else self.tensors[beside][expert].to(self._model.device, torch.float32)

    def put(self, name: str, expert: int, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """A new `matrix` (out, in) and `bias` (out,). Raises PruneError for values that the dtype cannot hold."""
        info = self._model.tensor_map[name]
        like = self._slice(info, self.tensors[name], expert)
        stored = as_stored(info, name, matrix.cpu(), like)
        if info.slices > 1:
            self._slice(info, self._writable(name), expert).copy_(stored)
        else:
            self.tensors[name] = stored
            self.changed.add(name)
        self._make_own(info)
        self._model.set_expert(info, expert, stored.to(self._model.device))
        beside = self._bias_name(name)
        if bias is not None and beside is not None:
            whole = self._writable(beside)
            whole[expert] = bias.cpu().to(whole.dtype)
            self._model.set_weight(self._model.tensor_map[beside], whole)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """The tensors as they are now, whatever is put later."""
        self._own.clear()
        return dict(self.tensors)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have all be as in a `snapshot`."""
        for name in self.changed:
            info = self._model.tensor_map[name]
            self.tensors[name] = tensors[name]
            if info.expert is not None and info.expert.index is not None:
                self._model.set_expert(info, info.expert.index, tensors[name].to(self._model.device))
            else:
                self._model.set_weight(info, tensors[name].clone())
        self._own.clear()

    def _bias_name(self, name: str) -> str | None:
        wanted = f"{self._model.tensor_map[name].parameter}_bias"
        return next((other for other in self.tensors if self._model.tensor_map[other].parameter == wanted), None)

    @staticmethod
    def _slice(info: TensorInfo, stored: torch.Tensor, expert: int) -> torch.Tensor:
        return matrices(info, stored)[expert] if info.slices > 1 else stored

    def _writable(self, name: str) -> torch.Tensor:
        """A tensor of all experts, which no snapshot shares."""
        if name not in self._own:
            self.tensors[name] = self.tensors[name].clone()
            self._own.add(name)
        self.changed.add(name)
        return self.tensors[name]

    def _make_own(self, info: TensorInfo) -> None:
        if info.parameter is not None and info.parameter not in self._parameters:
            self._model.make_own(info)
            self._parameters.add(info.parameter)
