"""Experts: where a checkpoint keeps their matrices, and what comes to and out of their last linear layer.

transformers computes all experts of a block in one module; `expert_kinds.py` has the ways in which it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.model.expert_kinds import ExpertsKind, is_of_attention, kind_of
from prune_cli.model.routed import Routed

_NUMBER = re.compile(r"\.experts?\.(\d+)\.")
_STACKED, _STACKED_IN_PARTS = ["MergeModulelist"], ["MergeModulelist", "Concatenate"]


@dataclass(frozen=True)
class ExpertPart:
    """Where a checkpoint tensor lies in the parameter of all `experts`: at its expert, from output `first` on.

    `module` computes with it. `index` is None for a tensor that holds all of them, one slice each, or of `rows` one
    below the other. `down`: the map after the activation. `transposed`: stored as (in, out); `turned`: the model
    computes with it the other way round than it is stored.
    """

    module: str
    down: bool
    index: int | None
    first: int
    experts: int
    transposed: bool
    turned: bool = False
    rows: bool = False

    def matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        """(experts, ...): a view of a tensor with the matrices of all."""
        return tensor.view(self.experts, -1, tensor.shape[-1]) if self.rows else tensor


def expert_part(
    model: nn.Module, parameter: str, entry: TensorEntry, converter: Any | None, pattern: str | None
) -> ExpertPart | Literal["unread", "of attention"] | None:
    """The part that `entry` is of `parameter`; None where the layout is none that is known here.

    `converter` (None: stored as computed with) is transformers' rule for the tensor, `pattern` the name it matched.
    What belongs to an expert that multiplies by no weights is "unread"; experts "of attention" are no mixture's.
    """
    found = _experts_of(model, parameter)
    if found is None:
        above = model.get_submodule(".".join(parameter.split(".")[:-2]))
        return "of attention" if is_of_attention(above) else None
    path, module, kind, name = found
    transposed, down, experts = kind.transposed(module, name), kind.maps[name], kind.experts(module)
    whole = tuple(module.get_parameter(name).shape)
    if converter is None:
        same = kind.rows or whole[0] == experts
        return ExpertPart(path, down, None, 0, experts, transposed, rows=kind.rows) if same else None
    number = _NUMBER.search(entry.name)
    operations = [type(operation).__name__ for operation in converter.operations]
    parts = len(converter.source_patterns)
    if operations == ["Transpose"] and entry.shape == (experts, whole[2], whole[1]) != whole:
        return ExpertPart(path, down, None, 0, experts, not transposed, turned=True)
    if operations == ["Transpose"] and entry.shape == whole != (experts, whole[2], whole[1]):
        return ExpertPart(path, down, None, 0, experts, transposed)
    if number is None or transposed or operations != (_STACKED if parts == 1 else _STACKED_IN_PARTS):
        return None
    if len(entry.shape) != 2 or (parts * entry.shape[0], entry.shape[1]) != whole[1:]:
        return None
    if int(number[1]) >= experts:
        return "unread" if whole[0] > experts else None
    first = converter.source_patterns.index(pattern) * entry.shape[0]
    return ExpertPart(path, down, int(number[1]), first, experts, transposed)


def _experts_of(model: nn.Module, parameter: str) -> tuple[str, nn.Module, ExpertsKind, str] | None:
    """The module that computes experts with `parameter`: path, module, kind, and the parameter's name under it."""
    parts = parameter.split(".")
    for below in (1, 2):
        path, name = ".".join(parts[:-below]), ".".join(parts[-below:])
        module = model.get_submodule(path)
        kind = kind_of(module)
        if kind is not None and name in kind.maps:
            return path, module, kind, name
    return None


def entrance(module: nn.Module) -> nn.Module:
    """What is called with all tokens of a batch before the experts of `module` compute."""
    return _kind(module).entrance(module)


def routed(module: nn.Module, arguments: Sequence[torch.Tensor], mask: torch.Tensor | None) -> Routed:
    """From what the entrance is called with; `mask` (samples, length) is False where the batch is padded."""
    return _kind(module).routed(module, arguments, mask)


def identities(module: nn.Module) -> int:
    """How many experts that return what they get stand behind those of `module` that multiply."""
    return _kind(module).identities(module)


def stores_unread(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether some of the tensors `names` belong to experts that multiply by no weights, as transformers saves them."""
    counts = {kind.experts(module) for module, kind in _with_identities(model)}
    numbers = {int(found[1]) for name in names if (found := _NUMBER.search(name))}
    return bool(counts) and any(number >= max(counts) for number in numbers)


def drop_unread(model: nn.Module) -> None:
    """Make `model`, on meta, have no rows for such experts: published checkpoints hold none, and nothing reads them."""
    for module, kind in _with_identities(model):
        experts = kind.experts(module)
        for name in kind.maps:
            parameter = getattr(module, name, None)
            if parameter is not None and len(parameter) > experts:
                setattr(module, name, nn.Parameter(parameter[:experts], requires_grad=False))


def _with_identities(model: nn.Module) -> list[tuple[nn.Module, ExpertsKind]]:
    found = [(module, kind_of(module)) for module in model.modules()]
    return [(module, kind) for module, kind in found if kind is not None and kind.identities(module)]


def before_down(module: nn.Module, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What the last layer of `expert` gets for `rows` (tokens, in) of the experts' input, as the module computes it."""
    return _kind(module).before_down(module, expert, rows)


def outputs_of(module: nn.Module, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """(tokens, hidden): what `expert` makes of `rows` (tokens, in), before its gate."""
    kind = _kind(module)
    return kind.last(module, expert, kind.before_down(module, expert, rows))


def tells_every_token(module: nn.Module) -> bool:
    """Whether the entrance is called with all tokens and the experts of each."""
    return _kind(module).every_token


def norms_outputs(module: nn.Module) -> bool:
    """Whether a norm stands behind the last map of each expert."""
    return bool(getattr(module, "has_post_expert_norm", False))


def _kind(module: nn.Module) -> ExpertsKind:
    kind = kind_of(module)
    assert kind is not None, "only experts of a known kind have an ExpertPart"
    return kind
