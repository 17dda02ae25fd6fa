"""The ways in which transformers computes the experts of a block: one class each, behind `ExpertsKind`.

Most have parameters (experts, out, in) or (experts, in, out) and say which; the others are told by their class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from prune_cli.model.routed import Routed

_FIRST_AND_LAST = {"gate_up_proj": False, "up_proj": False, "down_proj": True}
_GLU = {"mlp.w1": False, "mlp.v1": False, "mlp.w2": True}
_PARALLEL = {"input_linear.weight": False, "output_linear.weight": True}


class ExpertsKind(Protocol):
    """`maps`: the parameters by their names under the module, and whether each is the last, after the activation.

    Of `rows`, a parameter has the matrices of all experts one below the other. `every_token`: the entrance is called
    with all tokens.
    """

    maps: Mapping[str, bool]
    rows: bool
    every_token: bool

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` computes its experts so."""
        ...

    def experts(self, module: Any) -> int:
        """How many it has that multiply by weights."""
        ...

    def identities(self, module: Any) -> int:
        """How many more, behind them, return what they get."""
        ...

    def transposed(self, module: Any, name: str) -> bool:
        """Whether the matrices of the parameter `name` are (in, out)."""
        ...

    def entrance(self, module: Any) -> nn.Module:
        """The module that is called with all tokens of a batch, at which batches wait."""
        ...

    def routed(self, module: Any, arguments: Sequence[torch.Tensor], mask: torch.Tensor | None) -> Routed:
        """From the tensors that the entrance is called with."""
        ...

    def before_down(self, module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """What the last map of `expert` gets for `rows` (tokens, in), as the module computes it."""
        ...

    def last(self, module: Any, expert: int, inner: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden): what `expert` makes of that, before its gate."""
        ...


class _Described:
    """transformers' usual experts, which say how they are computed."""

    maps: Mapping[str, bool] = _FIRST_AND_LAST
    rows: bool = False
    every_token: bool = True

    def fits(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts"))

    def experts(self, module: Any) -> int:
        return module.num_experts

    def identities(self, module: Any) -> int:
        return 0

    def transposed(self, module: Any, name: str) -> bool:
        return bool(module.is_transposed)

    def entrance(self, module: Any) -> nn.Module:
        return module

    def routed(self, module: Any, arguments: Sequence[torch.Tensor], mask: torch.Tensor | None) -> Routed:
        hidden, chosen, gates = arguments[:3]
        return Routed.of_all(hidden, chosen, gates, mask)

    def before_down(self, module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
        name = "gate_up_proj" if module.has_gate else "up_proj"
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        outputs = nn.functional.linear(rows, weight.T if module.is_transposed else weight, bias)
        return module._apply_gate(outputs) if module.has_gate else module.act_fn(outputs)

    def last(self, module: Any, expert: int, inner: torch.Tensor) -> torch.Tensor:
        weight, bias = module.down_proj[expert], module.down_proj_bias[expert] if module.has_bias else None
        outputs = nn.functional.linear(inner, weight.T if module.is_transposed else weight, bias)
        return module.post_expert_norm(outputs) if getattr(module, "has_post_expert_norm", False) else outputs


class _RowsForAll(_Described):
    """Llama 4: each gets a row of zeros for every token that is not its own, and no list of the experts chosen."""

    every_token: bool = False

    def fits(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Llama4TextExperts"

    def transposed(self, module: Any, name: str) -> bool:
        return True

    def routed(self, module: Any, arguments: Sequence[torch.Tensor], mask: torch.Tensor | None) -> Routed:
        hidden = arguments[0].reshape(-1, arguments[0].shape[-1])
        sent = hidden.view(module.num_experts, -1, hidden.shape[-1]).any(-1)
        sent = sent if mask is None else sent & mask.flatten().to(hidden.device)
        chosen = sent.nonzero()[:, :1]
        # Here the inputs come multiplied by the gates.
        return Routed(hidden[sent.flatten()], chosen, torch.ones_like(chosen, dtype=hidden.dtype), every_token=False)

    def before_down(self, module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ module.gate_up_proj[expert]).chunk(2, dim=-1)
        return up * module.act_fn(gate)

    def last(self, module: Any, expert: int, inner: torch.Tensor) -> torch.Tensor:
        return inner @ module.down_proj[expert]


class _BesideIdentities(_Described):
    """LongCat: behind the experts with weights come some that return what they get, whose rows are never read."""

    def fits(self, module: nn.Module) -> bool:
        return type(module).__name__ == "LongcatFlashExperts"

    def experts(self, module: Any) -> int:
        return module.num_routed_experts

    def identities(self, module: Any) -> int:
        return module.zero_expert_num

    def transposed(self, module: Any, name: str) -> bool:
        return False

    def before_down(self, module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
        return module.act_fn(gate) * up

    def last(self, module: Any, expert: int, inner: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inner, module.down_proj[expert])


class _OneBelowTheOther(_Described):
    """DBRX: parameters (experts x inner, hidden) of a module of their own, of which w2 is (in, out)."""

    maps: Mapping[str, bool] = _GLU
    rows: bool = True

    def fits(self, module: nn.Module) -> bool:
        return type(module).__name__ == "DbrxExperts"

    def transposed(self, module: Any, name: str) -> bool:
        return self.maps[name]

    def before_down(self, module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ self._matrix(module, getattr(module.mlp, name), expert).T for name in ("w1", "v1"))
        return module.mlp.activation_fn(gate) * up

    def last(self, module: Any, expert: int, inner: torch.Tensor) -> torch.Tensor:
        return inner @ self._matrix(module, module.mlp.w2, expert)

    def _matrix(self, module: Any, parameter: torch.Tensor, expert: int) -> torch.Tensor:
        return parameter.view(module.num_experts, -1, module.hidden_size)[expert]


class _BehindTheirRouter(_Described):
    """JetMoE: two modules that get the tokens sorted by experts; the router before them has all tokens."""

    maps: Mapping[str, bool] = _PARALLEL

    def fits(self, module: nn.Module) -> bool:
        return type(module).__name__ == "JetMoeMoE"

    def experts(self, module: Any) -> int:
        return module.input_linear.num_experts

    def transposed(self, module: Any, name: str) -> bool:
        return False

    def entrance(self, module: Any) -> nn.Module:
        return module.router

    def routed(self, module: Any, arguments: Sequence[torch.Tensor], mask: torch.Tensor | None) -> Routed:
        hidden = arguments[0]
        # The router itself would stop here again.
        logits = nn.functional.linear(hidden, module.router.layer.weight).float()
        best, chosen = logits.topk(module.router.top_k, dim=-1)
        return Routed.of_all(hidden, chosen, best.softmax(-1).type_as(hidden), mask)

    def before_down(self, module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(rows, module.input_linear.weight[expert]).chunk(2, dim=-1)
        return module.activation(gate) * up

    def last(self, module: Any, expert: int, inner: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inner, module.output_linear.weight[expert])


_KINDS: tuple[ExpertsKind, ...] = (
    _RowsForAll(),
    _BesideIdentities(),
    _OneBelowTheOther(),
    _BehindTheirRouter(),
    _Described(),
)


def is_of_attention(module: nn.Module) -> bool:
    """Whether `module` has experts of attention (JetMoE), whose last map gets what attention makes of all tokens."""
    return type(module).__name__ == "JetMoeMoA"


def kind_of(module: nn.Module) -> ExpertsKind | None:
    """How `module` computes its experts; None where it has none, or in a way unknown here."""
    return next((kind for kind in _KINDS if kind.fits(module)), None)
