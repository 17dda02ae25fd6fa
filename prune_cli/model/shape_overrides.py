"""Models whose blocks differ in size: config.json lists the shapes that its architecture cannot express.

The list stands under `quantization_config`, where transformers looks for who knows how to load a checkpoint. Where
nobody has registered for it, loading fails because the shapes do not match.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prune_cli.errors import RequestError

QUANT_METHOD = "prune-cli-sizes"
_VERSION = 1


def sizes_entry(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `quantization_config` of a model in which these parameters have these shapes."""
    return {"quant_method": QUANT_METHOD, "version": _VERSION, "shapes": {n: list(s) for n, s in shapes.items()}}


def is_sized(entry: Any) -> bool:
    """Whether a `quantization_config`, as JSON or as transformers' object, is such a list."""
    return _field(entry, "quant_method") == QUANT_METHOD


def resize(model: nn.Module, entry: Any) -> None:
    """Give the parameters of a model on meta the shapes in `entry`; raises RequestError for a list that fits not."""
    if _field(entry, "version") != _VERSION:
        raise RequestError(
            f"config.json lists sizes of version {_field(entry, 'version')!r} and this prune-cli reads {_VERSION}: "
            "update prune-cli."
        )
    for name, shape in _field(entry, "shapes").items():
        path, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(path)
            old = module.get_parameter(leaf)
        except AttributeError as error:
            raise RequestError(f"config.json lists a size for {name}, which this model does not have.") from error
        if len(shape) != old.ndim:
            raise RequestError(f"config.json lists the size {shape} for {name}, which has {old.ndim} dimensions.")
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        module.register_parameter(leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        if leaf == "weight":
            _tell(module, shape)


def _tell(module: nn.Module, shape: list[int]) -> None:
    """What linear layers (out, in) and GPT-2's (in, out) know of their sizes."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif hasattr(module, "nf"):
        module.nx, module.nf = shape  # pyright: ignore[reportArgumentType]


def _field(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, Mapping) else getattr(entry, name, None)
