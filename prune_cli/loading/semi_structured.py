"""2:4 layers of a loaded model as PyTorch's semi-structured tensors, which recent NVIDIA GPUs multiply faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from prune_cli.errors import PruneError

_OLDEST_GPU = (8, 0)
# Of each dtype, what rows and columns must be multiples of: both of torch's backends (CUTLASS, cuSPARSELt) take these.
_MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}


@dataclass(frozen=True)
class SemiStructured:
    """The names of the layers that were `converted`, and for each that was `kept` dense why."""

    converted: tuple[str, ...]
    kept: Mapping[str, str]


@torch.no_grad()
def to_semi_structured(model: nn.Module) -> SemiStructured:
    """Convert in place the weight of every `nn.Linear` of `model` that is 2:4 along its rows; for inference only.

    What is no `nn.Linear` (experts in one tensor, GPT-2's Conv1D) stays dense. Raises PruneError, before anything is
    changed, where no device of the model can multiply such tensors.
    """
    check_devices({parameter.device for parameter in model.parameters()})
    chosen, kept = choose_layers(model, device_problem)
    converted = []
    for name in chosen:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        try:
            weight = to_sparse_semi_structured(layer.weight.detach().contiguous())
        except RuntimeError as error:
            kept[name] = f"torch refuses it: {error}"
            continue
        layer.weight = nn.Parameter(weight, requires_grad=False)
        converted.append(name)
    return SemiStructured(tuple(converted), kept)


def check_devices(devices: set[torch.device]) -> None:
    """Raises PruneError if none of `devices` has the kernels."""
    problems = {str(device): device_problem(device) for device in devices}
    if problems and all(problems.values()):
        told = "; ".join(sorted(filter(None, problems.values())))
        raise PruneError(
            f"No weight of the model is where 2:4 kernels run: {told}. They need an NVIDIA GPU of compute capability "
            "8.0 or newer: move the model there first (model.to('cuda')), or use it as it is."
        )


def device_problem(device: torch.device) -> str | None:
    """Why `device` cannot multiply semi-structured tensors; None if it can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"{device} is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_GPU:
        return f"{device} has compute capability {'.'.join(map(str, capability))}, below 8.0"
    return None


def choose_layers(
    model: nn.Module, problem_of: Callable[[torch.device], str | None]
) -> tuple[list[str], dict[str, str]]:
    """The `nn.Linear` layers to convert, and for every other one why not; looks at every weight, changes nothing."""
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    chosen: list[str] = []
    kept: dict[str, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            reason = problem_of(layer.weight.device) or _problem(layer.weight, users[id(layer.weight)])
            if reason is None:
                chosen.append(name)
            else:
                kept[name] = reason
    return chosen, kept


def _problem(weight: torch.Tensor, users: int) -> str | None:
    """Why a weight on a device with the kernels stays dense."""
    if users > 1:
        return "its weight is shared with another layer"
    if weight.dtype not in _MULTIPLES:
        return f"it is {str(weight.dtype).removeprefix('torch.')}: load the model in bfloat16 or float16"
    rows, columns = _MULTIPLES[weight.dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape {list(weight.shape)} is no multiple of {rows} x {columns}"
    fullest = int((weight.reshape(-1, 4) != 0).sum(1).max())
    return f"it is not 2:4: {fullest} of 4 weights are kept somewhere" if fullest > 2 else None
