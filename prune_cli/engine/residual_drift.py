"""What the residual stream has lost where a layer of the block adds to it, told without knowing the architecture.

Most blocks return their input plus the outputs of a few layers (attention's and the MLP's last), scaled in some
architectures. Which ones, is found by trying one batch; where a block works otherwise (norms on the outputs, experts),
nothing is found and such linear layers follow their own dense outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import linear

from calibration.batch import Batch
from calibration.statistics import sum_dtype
from prune_cli.engine.padding import real_rows
from prune_cli.engine.stream import Stream

# The sum may miss what rounding takes, for nearly every element; and must explain most of what the block changes.
# The idea of solving with the pruned model's inputs towards the dense one's outputs, there for quantisation.
DENSE_TARGET_PAPER = (
    "asymmetric calibration as in Li et al., GPTAQ: Efficient Finetuning-Free Quantization, arXiv:2504.02692"
)
_ROUNDINGS, _NEARLY_ALL, _MOST = 8.0, 0.98, 0.5
_LEAST_FACTOR, _DIGITS = 1e-2, 4


def wanted_outputs(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dense: Sequence[torch.Tensor],
    lost: Sequence[torch.Tensor],
    batches: Sequence[Batch],
) -> Iterator[torch.Tensor]:
    """For each of `batches` (tokens, out): what the dense layer gives, and what the stream lacks there besides.

    `weight` (out, in) and `bias` (out,) are the dense layer's, `dense` (..., in) its inputs.
    """
    for x, r, batch in zip(dense, lost, batches, strict=True):
        yield linear(real_rows(x, batch), weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).add_(
            real_rows(r, batch)
        )


class ResidualDrift:
    """The difference of the residual streams, dense - pruned, of every batch on its way through one block."""

    def __init__(self, factors: dict[str, float], lost: list[torch.Tensor]) -> None:
        self._factors = factors
        self._lost = lost

    def at(self, name: str, batches: int) -> list[torch.Tensor] | None:
        """What the output of the layer `name` would have to add for each of the batches; None if it adds to nothing."""
        if name not in self._factors or batches != len(self._lost):
            return None
        return [lost / self._factors[name] for lost in self._lost]


@contextmanager
def residual_drift(stream: Stream, dense: Stream, factors: dict[str, float]) -> Iterator[ResidualDrift]:
    """Follow the drift through the block before which both streams wait, of which `residual_factors` tells."""
    pairs = zip(dense.waiting(), stream.waiting(), strict=True)
    lost = [a - b for a, b in pairs if a is not None and b is not None] if factors else []
    drift = ResidualDrift(factors, lost)
    hooks = [
        each.module(name).register_forward_hook(_adds(each, lost, sign * factor))
        for name, factor in factors.items()
        for each, sign in ((stream, -1.0), (dense, 1.0))
    ]
    try:
        yield drift
    finally:
        for hook in hooks:
            hook.remove()


def _adds(stream: Stream, lost: list[torch.Tensor], factor: float) -> Callable[..., None]:
    def add(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        mine = lost[stream.current()]
        mine.add_(output.reshape(mine.shape), alpha=factor)

    return add


def residual_factors(dense: Stream, block: int, names: Sequence[str]) -> dict[str, float]:
    """Layer's name -> how many times its output is in what `block` adds; empty if that is no sum of such outputs.

    `dense` waits before the block; `names` are the linear layers that it has.
    """
    outputs: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.update({name: output})

    hooks = [dense.module(name).register_forward_hook(remember(name)) for name in names]
    try:
        before, after = dense.probe(block)
    finally:
        for hook in hooks:
            hook.remove()
    after = after[0] if isinstance(after, tuple) else after
    if before is None or not isinstance(after, torch.Tensor) or after.shape != before.shape:
        return {}
    found = {name: out for name, out in outputs.items() if out.numel() == before.numel()}
    return _fit(before, after, found) if found else {}


def _float64(states: torch.Tensor) -> torch.Tensor:
    """Flat; on the host where their device has no float64."""
    return (states if sum_dtype(states.device) == torch.float64 else states.cpu()).flatten().double()


def _fit(before: torch.Tensor, after: torch.Tensor, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Least squares for after - before, each element in units of its own rounding."""
    rounding = torch.finfo(before.dtype).eps
    before, after, *columns = (_float64(each) for each in (before, after, *outputs.values()))
    columns = torch.stack(columns, 1)
    size = before.abs() + after.abs() + columns.abs().sum(1)
    unit = rounding * size.clamp_min(torch.finfo(torch.float32).tiny)
    change, columns = (after - before) / unit, columns / unit[:, None]
    gram = columns.T @ columns
    gram.diagonal().mul_(1 + 1e-9).add_(1e-9)
    factors = torch.linalg.solve(gram, columns.T @ change)
    missed = change - columns @ factors
    fits = float((missed.abs() <= _ROUNDINGS).double().mean()) >= _NEARLY_ALL
    explains = float(missed.square().sum()) <= (1 - _MOST) * float(change.square().sum())
    if not (fits and explains):
        return {}
    return {
        name: round(float(factor), _DIGITS)
        for name, factor in zip(outputs, factors, strict=True)
        if abs(float(factor)) > _LEAST_FACTOR
    }
