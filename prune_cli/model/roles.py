"""What a parameter is in a model: a linear layer to prune, or something that is kept, and why."""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Role = Literal[
    "linear map",
    "embedding",
    "output head",
    "norm",
    "router",
    "bias",
    "expert",
    "attention expert",
    "convolution",
    "other",
    "extra head",
    "unused",
    "unknown",
]
_ROUTER_NAMES = frozenset({"gate", "router", "wg", "shared_expert_gate", "layer_router"})
_WHY_KEPT: dict[Role, str] = {
    "embedding": "embeddings are kept by default",
    "output head": "the output head is kept by default",
    "norm": "norms are kept by default",
    "router": "routers are kept by default",
    "bias": "biases are kept by default",
    "expert": "experts that are stored or computed in this way are not supported",
    "convolution": "a convolution, no linear map",
}


def role_of(model: PreTrainedModel, parameter: str, ndim: int, *, in_block: bool) -> tuple[Role, str]:
    """The role of a parameter and the reason why it is kept by default (empty for a linear layer of a block)."""
    path, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(path)
    role = _role(model, owner, path, leaf, ndim)
    if role == "linear map" and not in_block:
        return "other", "a linear layer outside the decoder blocks"
    if role == "expert" and not in_block:
        return "other", "an expert outside the decoder blocks"
    if role == "other":
        return role, f"a parameter of {type(owner).__name__} that is no linear map"
    return role, _WHY_KEPT.get(role, "")


def _role(model: PreTrainedModel, owner: nn.Module, path: str, leaf: str, ndim: int) -> Role:
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    if _is_expert(owner, path) and ndim > 1:
        return "expert"
    if "norm" in type(owner).__name__.lower() or (ndim == 1 and "norm" in leaf):
        return "norm"
    if owner is model.get_output_embeddings():
        return "output head"
    if _is_router(model, owner, path):
        return "router"
    if isinstance(owner, nn.Linear | Conv1D) and ndim == 2:
        return "linear map"
    if isinstance(owner, nn.Conv1d):
        return "convolution"
    return "other"


def _is_expert(owner: nn.Module, path: str) -> bool:
    parts = path.split(".")
    if "router" in parts:
        return False
    return "experts" in type(owner).__name__.lower() or any(part in {"experts", "expert"} for part in parts)


def _is_router(model: PreTrainedModel, owner: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    kind = type(owner).__name__.lower()
    if "router" in kind or "router" in path.split("."):
        return True
    if name not in _ROUTER_NAMES:
        return False
    return any("expert" in child for child, _ in model.get_submodule(parent).named_modules())
