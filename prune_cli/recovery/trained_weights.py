"""What an end-to-end recovery trains: kept weights themselves, or low-rank updates of them; zeros are held."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from methods._block_matching import rms_of_kept, width_of
from prune_cli.engine.seeds import seed_of
from prune_cli.model.roles import Role
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.recovery.request import Part, RecoverRequest
from prune_cli.recovery.trained_block import ROUTERS, TRAINED, trained_names, why_kept

_USUAL_WIDTH = 256.0
# Parts of the names of MLPs; every other linear layer mixes tokens.
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|moe|fc\d?(_in|_out)?$|(gate|up|down)_proj$|dense_h_to|dense_4h")
_OWN_PARTS: dict[Role, Part] = {"norm": "norms", "bias": "biases", "router": "routers"}


class KeptWeights:
    """All `parameters` (float32, as the model computes with them) are trained; gradients of zeros are left out."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.kept = {name: value.detach() != 0 for name, value in parameters.items()}

    @property
    def optimised(self) -> Mapping[str, nn.Parameter]:
        """What the optimiser moves, and a state that is saved holds."""
        return self.parameters

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Of the optimiser: the most that a step changes is `rate` of a tensor's size, as in block matching."""
        return [{"params": [value], "share": _share(value, rate)} for value in self.parameters.values()]

    def take_gradients(self) -> None:
        """After a backward pass: masked, and where the optimiser looks for them."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(self.kept[name])

    def apply(self) -> None:
        """After a step, or when a saved state was read: the model computes with what the optimiser has."""


class LowRankUpdates(KeptWeights):
    """W = W0 + M * (B A) for every matrix, folded into it (MaskLoRA of PERP, arXiv:2312.15230, equation 2).

    A is (rank, in), B (out, rank) and zero at first; for stacked experts each has its own. Vectors, and matrices no
    larger than the rank, are trained themselves. The gradient of the whole W is there for one pass, its moments never.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rank: int, seed: int) -> None:
        super().__init__(parameters)
        self._start: dict[str, torch.Tensor] = {}
        self._factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, value in parameters.items():
            if value.ndim > 1 and min(value.shape[-2:]) > rank:
                self._start[name] = value.detach().clone()
                self._factors[name] = _factors(value, rank, seed_of(f"low rank {name}", seed))

    @property
    def optimised(self) -> Mapping[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name, value in self.parameters.items():
            if name in self._factors:
                found[f"{name}.A"], found[f"{name}.B"] = self._factors[name]
            else:
                found[name] = value
        return found

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Entries of A are such that W changes as much as an entry of B does."""
        found = []
        for name, value in self.parameters.items():
            if name in self._factors:
                a, b = self._factors[name]
                found += [
                    {"params": [a], "share": rate * rms_of_kept(a)},
                    {"params": [b], "share": _share(value, rate)},
                ]
            else:
                found.append({"params": [value], "share": _share(value, rate)})
        return found

    def take_gradients(self) -> None:
        super().take_gradients()
        for name, (a, b) in self._factors.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                a.grad, b.grad = b.detach().mT @ gradient, gradient @ a.detach().mT
                self.parameters[name].grad = None

    def apply(self) -> None:
        for name, (a, b) in self._factors.items():
            update = (b.detach() @ a.detach()).mul_(self.kept[name])
            self.parameters[name].data.copy_(update.add_(self._start[name]))


def _factors(value: torch.Tensor, rank: int, seed: int) -> tuple[nn.Parameter, nn.Parameter]:
    *stacked, outputs, inputs = value.shape
    drawn = torch.randn(*stacked, rank, inputs, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)
    zeros = torch.zeros(*stacked, outputs, rank, device=value.device)
    return nn.Parameter(drawn.to(value.device)), nn.Parameter(zeros)


def _share(value: torch.Tensor, rate: float) -> float:
    return rate * math.sqrt(_USUAL_WIDTH / width_of(value)) * rms_of_kept(value)


def weights_of(request: RecoverRequest, parameters: Mapping[str, nn.Parameter]) -> KeptWeights:
    """As --how says."""
    if request.how == "lora":
        return LowRankUpdates(parameters, request.low_rank, request.seed)
    return KeptWeights(parameters)


def names_to_train(model: StreamedModel, request: RecoverRequest) -> list[str]:
    """The checkpoint tensors that move, in the model's order."""
    roles = ROUTERS if request.how == "router" else TRAINED
    movable = {name for block in range(len(model.blocks)) for name in trained_names(model, block, roles)}
    return [name for name, info in model.tensor_map.items() if name in movable and part_of(info) in request.parts]


def why_not_trained(model: StreamedModel, request: RecoverRequest, name: str) -> str:
    """Why `names_to_train` has not the tensor `name`."""
    info = model.tensor_map[name]
    roles = ROUTERS if request.how == "router" else TRAINED
    if reason := why_kept(model, name, roles):
        return reason
    if part_of(info) not in request.parts:
        return f"belongs to {part_of(info)}, which --train does not name"
    return "computed with a tensor that is not trained"


def part_of(info: TensorInfo) -> Part:
    """What a tensor that can be trained belongs to."""
    if info.role in _OWN_PARTS:
        return _OWN_PARTS[info.role]
    name = "" if info.parameter is None else info.module_name
    inner = name.split(".layers.")[-1].split(".h.")[-1].split(".blocks.")[-1]
    return "mlp" if info.expert is not None or info.role == "expert" or _MLP.search(inner) else "attention"
