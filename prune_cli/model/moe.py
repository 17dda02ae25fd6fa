"""Experts: where a checkpoint keeps their matrices, which tokens they see, and what comes to their last map.

transformers computes all experts of a block in one module, with parameters (experts, out, in) or (experts, in, out).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune_cli.checkpoint.reader import TensorEntry

# Parameters of the experts' modules: whether the map is the last, whose inputs come from the others.
_MAPS = {"gate_up_proj": False, "up_proj": False, "down_proj": True}
# How transformers' experts say what they do; those without it, but for one, are computed in ways of their own.
_DESCRIBED = ("has_gate", "has_bias", "is_transposed", "num_experts")
# These get a row of zeros for every token that is not theirs, and no list of the experts chosen.
_ROWS_FOR_ALL = "Llama4TextExperts"
_NUMBER = re.compile(r"\.experts?\.(\d+)\.")
_STACKED, _STACKED_IN_PARTS = ["MergeModulelist"], ["MergeModulelist", "Concatenate"]


@dataclass(frozen=True)
class ExpertPart:
    """Where a checkpoint tensor lies in the parameter of all `experts`: at its expert, from output `first` on.

    `index` is None for a tensor that holds all of them, one slice each. `down`: the map after the activation.
    `transposed`: stored as (in, out); `turned`: the model computes with it the other way round than it is stored.
    """

    down: bool
    index: int | None
    first: int
    experts: int
    transposed: bool
    turned: bool = False


def expert_part(
    module: nn.Module, leaf: str, entry: TensorEntry, converter: Any | None, pattern: str | None
) -> ExpertPart | None:
    """The part that `entry` is of the parameter `leaf` of `module`; None where the layout is none that is known here.

    `converter` (None: stored as computed with) is transformers' rule for the tensor, `pattern` the name it matched.
    """
    described = all(hasattr(module, name) for name in _DESCRIBED)
    if leaf not in _MAPS or not (described or _has_rows_for_all(module)):
        return None
    transposed = bool(getattr(module, "is_transposed", True))
    experts, *_ = whole = tuple(getattr(module, leaf).shape)
    if converter is None:
        return ExpertPart(_MAPS[leaf], None, 0, experts, transposed)
    number = _NUMBER.search(entry.name)
    operations = [type(operation).__name__ for operation in converter.operations]
    parts = len(converter.source_patterns)
    if operations == ["Transpose"] and entry.shape == (experts, whole[2], whole[1]) != whole:
        return ExpertPart(_MAPS[leaf], None, 0, experts, not transposed, turned=True)
    if operations == ["Transpose"] and entry.shape == whole != (experts, whole[2], whole[1]):
        return ExpertPart(_MAPS[leaf], None, 0, experts, transposed)
    if number is None or transposed or operations != (_STACKED if parts == 1 else _STACKED_IN_PARTS):
        return None
    if len(entry.shape) != 2 or (experts, parts * entry.shape[0], entry.shape[1]) != whole:
        return None
    first = converter.source_patterns.index(pattern) * entry.shape[0]
    return ExpertPart(_MAPS[leaf], int(number[1]), first, experts, transposed)


def _has_rows_for_all(module: nn.Module) -> bool:
    return type(module).__name__ == _ROWS_FOR_ALL


def before_down(module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What the last map of `expert` gets for `rows` (tokens, in) of the experts' input, as the module computes it."""
    if _has_rows_for_all(module):
        gate, up = (rows @ module.gate_up_proj[expert]).chunk(2, dim=-1)
        return up * module.act_fn(gate)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    outputs = nn.functional.linear(rows, weight.T if module.is_transposed else weight, bias)
    return module._apply_gate(outputs) if module.has_gate else module.act_fn(outputs)


def outputs_of(module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """(tokens, hidden): what `expert` makes of `rows` (tokens, in), before its gate."""
    inner, weight = before_down(module, expert, rows), module.down_proj[expert]
    if _has_rows_for_all(module):
        return inner @ weight
    bias = module.down_proj_bias[expert] if module.has_bias else None
    outputs = nn.functional.linear(inner, weight.T if module.is_transposed else weight, bias)
    return module.post_expert_norm(outputs) if getattr(module, "has_post_expert_norm", False) else outputs


@dataclass(frozen=True)
class Routed:
    """A batch that waits at the experts of a block: `hidden` (tokens, in), `chosen` (tokens, k) experts of each.

    `gates` (tokens, k) are what the experts' outputs are multiplied by. `every_token`: `hidden` has all tokens in their
    order, whatever their experts. Padding is no token.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    gates: torch.Tensor
    every_token: bool

    @classmethod
    def of(cls, module: nn.Module, arguments: Sequence[torch.Tensor], mask: torch.Tensor | None) -> Routed:
        """From what the experts' `module` is called with: hidden states, experts chosen, their weights.

        `mask` (samples, length) is False where the batch is padded.
        """
        hidden = arguments[0].reshape(-1, arguments[0].shape[-1])
        real = None if mask is None else mask.flatten().to(hidden.device)
        if _has_rows_for_all(module):
            sent = hidden.view(module.num_experts, -1, hidden.shape[-1]).any(-1)  # pyright: ignore[reportCallIssue, reportArgumentType]
            sent = sent if real is None else sent & real
            chosen = sent.nonzero()[:, :1]
            # Here the inputs come multiplied by the gates.
            return cls(hidden[sent.flatten()], chosen, torch.ones_like(chosen, dtype=hidden.dtype), every_token=False)
        chosen, gates = (argument.reshape(len(hidden), -1) for argument in arguments[1:3])
        if real is not None:
            hidden, chosen, gates = hidden[real], chosen[real], gates[real]
        return cls(hidden, chosen, gates, every_token=True)

    def tokens_of(self, expert: int) -> torch.Tensor:
        """The numbers of the tokens that `expert` gets, in their order."""
        return (self.chosen == expert).any(-1).nonzero().flatten()

    def gates_of(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """(tokens,): the gates of `expert` for tokens that it gets."""
        return torch.where(self.chosen == expert, self.gates, 0)[tokens].sum(-1)

    def all_tokens(self) -> torch.Tensor:
        return torch.arange(len(self.hidden), device=self.hidden.device)
