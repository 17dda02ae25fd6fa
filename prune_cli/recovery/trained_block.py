"""The tensors of one block as parameters that can be trained, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.stored_values import to_stored
from prune_cli.model.roles import Role
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo

# What moves in a block; routers alone, or all but them.
TRAINED: frozenset[Role] = frozenset({"linear map", "expert", "norm", "bias", "convolution"})
ROUTERS: frozenset[Role] = frozenset({"router"})


def why_kept(model: StreamedModel, name: str, roles: Collection[Role] = TRAINED) -> str:
    """Why the tensor `name` is not trained where those of `roles` are; empty for one that is."""
    info = model.tensor_map[name]
    if info.block is None:
        return "outside the blocks"
    if info.parameter is None:
        return info.reason
    if info.parameter.rpartition(".")[2] in model.module_of(name)._buffers:
        return "no parameter: the architecture does not train it"
    if info.role not in roles:
        return "routers are not trained" if info.role == "router" else f"{info.role}: not trained"
    if info.entry.dtype not in FLOATS:
        return f"stored as {info.entry.dtype}"
    if model.tied_names(name):
        return "shared with another tensor"
    if info.expert is None and info.entry.shape != model.shape_of(info.parameter):
        return "stored in another layout than the model computes with"
    return ""


def trained_names(model: StreamedModel, block: int, roles: Collection[Role] = TRAINED) -> list[str]:
    """The tensors of a block that are trained: all of a parameter's, or none of them."""
    names = model.block_names(block)
    kept = {model.tensor_map[name].parameter for name in names if why_kept(model, name, roles)}
    return [name for name in names if model.tensor_map[name].parameter not in kept]


def all_trained(model: StreamedModel) -> set[str]:
    """The tensors of all blocks that are trained."""
    return {name for block in range(len(model.blocks)) for name in trained_names(model, block)}


@contextmanager
def trainable(model: StreamedModel, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters behind the tensors `names` of a loaded block, in float32 and with gradients, where it has them."""
    wanted = dict.fromkeys(parameter for name in names if (parameter := model.tensor_map[name].parameter))
    parameters: dict[str, nn.Parameter] = {}
    for name in wanted:
        path, _, leaf = name.rpartition(".")
        module = model.model.get_submodule(path)
        value = module.get_parameter(leaf).detach().to(torch.float32, copy=True)
        module.register_parameter(leaf, nn.Parameter(value))
        parameters[name] = module.get_parameter(leaf)
    try:
        yield parameters
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def as_stored(
    model: StreamedModel, tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The trained values of `tensors`, a block's as it was loaded, in their dtypes; zeros, and only they, are zero.

    Raises PruneError naming a tensor whose dtype cannot hold its new values.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, before in tensors.items():
        info = model.tensor_map[name]
        if info.parameter is not None and info.parameter in parameters:
            value = _part(info, parameters[info.parameter].detach().cpu())
            new = to_stored(name, value, before.dtype).reshape(before.shape)
            # A weight too small for the dtype would be another zero: it keeps its old value.
            stored[name] = torch.where((before == 0) | (new == 0), before, new)
    return stored


def _part(info: TensorInfo, parameter: torch.Tensor) -> torch.Tensor:
    """What a checkpoint tensor holds of its parameter."""
    part = info.expert
    if part is None:
        return parameter
    if part.index is not None:
        parameter = parameter[part.index][part.first : part.first + info.entry.shape[0]]
    return parameter.mT if part.turned else parameter


class Trained(Checkpoint):
    """`source` with new values for some of its tensors, held in memory."""

    def __init__(self, source: Checkpoint, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__(source.folder, source.entries, source.files, source.index)
        self._source, self._values = source, values

    def read(self, name: str) -> torch.Tensor:
        return self._values[name] if name in self._values else self._source.read(name)
