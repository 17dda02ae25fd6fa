"""Block matching: all weights of a pruned block are trained until the block does what the dense one did.

`min sum_t ||B(x_t; M*W, gains, biases) - y_t||^2` by Adam, as "transformer matching" in 3BASiL (arXiv:2603.01376) and
"A Free Lunch in LLM Compression" (arXiv:2510.14444); their learning rates are for weights of one size, ours are shares
of each tensor's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from methods._precision import widest

# One batch through the block as its parameters now are: (tokens, hidden).
Forward = Callable[[], torch.Tensor]
_BETAS = (0.9, 0.99)
_WIDTH = 256.0


@dataclass(frozen=True)
class Schedule:
    """`rate` is the share of a tensor's size, the root mean square of its kept weights, that a step may change.

    That is for vectors and for matrices of width 256; wider ones take less, by the square root (Tensor Programs V,
    arXiv:2203.03466: Adam's rate goes with 1 / width, and weights with its square root). It falls on a cosine to `last`
    of itself over all `epochs`.
    """

    epochs: int
    rate: float
    last: float


@dataclass(frozen=True)
class Matched:
    """||B - y||^2 / ||y||^2 on held-out batches: `epochs` has that of each; `best` counts from 1, 0 is the start."""

    before: float
    epochs: tuple[float, ...]
    best: int

    @property
    def after(self) -> float:
        return self.epochs[self.best - 1] if self.best else self.before


@dataclass(frozen=True)
class Examples:
    """Batches and what the block should make of each: `targets` (tokens, hidden)."""

    forwards: Sequence[Forward]
    targets: Sequence[torch.Tensor]

    def error(self) -> float:
        """||B - y||^2 / ||y||^2 over all batches."""
        with torch.no_grad():
            missed = sum(
                _square(forward() - wanted) for forward, wanted in zip(self.forwards, self.targets, strict=True)
            )
            missed, target = float(missed), float(sum(_square(wanted) for wanted in self.targets))
        return missed / target if target else 0.0


def _square(values: torch.Tensor) -> torch.Tensor:
    """||y||^2, on the device: the host waits for all batches once."""
    return values.to(widest(values.device)).square().sum()


def match(
    parameters: Mapping[str, torch.nn.Parameter],
    fit: Examples,
    held_out: Examples,
    schedule: Schedule,
    generator: torch.Generator,
) -> Matched:
    """Train `parameters` (float32) in place on `fit`; zeros stay zeros.

    They end as they were after the epoch with the least error on `held_out`, or as they began. `generator` orders the
    batches of every epoch. Where the error of an epoch is not finite, it is the last one.
    """
    best = {name: value.detach().clone() for name, value in parameters.items()}
    before = least = held_out.error()
    optimiser = torch.optim.Adam(_groups(parameters, schedule), betas=_BETAS, fused=_fused(parameters))
    steps, step = schedule.epochs * len(fit.forwards), 0
    size = float(sum(_square(target) / target.numel() for target in fit.targets)) / len(fit.targets)
    errors: list[float] = []
    chosen = 0
    for epoch in range(schedule.epochs):
        for index in torch.randperm(len(fit.forwards), generator=generator).tolist():
            _set_rates(optimiser, schedule, step / steps)
            _step(optimiser, parameters, best, fit, index, size)
            step += 1
        error = held_out.error()
        if not math.isfinite(error):
            break
        errors.append(error)
        if error < least:
            least, chosen = error, epoch + 1
            for name, value in parameters.items():
                best[name].copy_(value.detach())
    _restore(parameters, best)
    return Matched(before, tuple(errors), chosen)


def _restore(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
            parameter.grad = None


def _step(
    optimiser: torch.optim.Adam,
    parameters: Mapping[str, torch.nn.Parameter],
    zeros: Mapping[str, torch.Tensor],
    fit: Examples,
    index: int,
    size: float,
) -> None:
    with torch.enable_grad():
        loss = (fit.forwards[index]() - fit.targets[index]).float().square().sum() / size
    loss.backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            # All that were kept have the zeros of the start.
            parameter.grad.masked_fill_(zeros[name] == 0, 0.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def _groups(parameters: Mapping[str, torch.nn.Parameter], schedule: Schedule) -> list[dict[str, object]]:
    return [
        {"params": [each], "share": schedule.rate * math.sqrt(_WIDTH / width_of(each)) * rms_of_kept(each)}
        for each in parameters.values()
    ]


def _set_rates(optimiser: torch.optim.Adam, schedule: Schedule, done: float) -> None:
    left = schedule.last + (1 - schedule.last) * (1 + math.cos(math.pi * done)) / 2
    for group in optimiser.param_groups:
        group["lr"] = group["share"] * left


def width_of(values: torch.Tensor) -> float:
    """The geometric mean of inputs and outputs of a matrix, whichever way it is stored; `_WIDTH` of a vector."""
    return math.sqrt(values.shape[-1] * values.shape[-2]) if values.ndim > 1 else _WIDTH


def rms_of_kept(values: torch.Tensor) -> float:
    """The root mean square of those that are not zero; 0 where all are."""
    count = int(values.detach().count_nonzero())
    return math.sqrt(float(_square(values.detach())) / count) if count else 0.0


def _fused(parameters: Mapping[str, torch.nn.Parameter]) -> bool:
    """One pass over each tensor, without copies, where torch has it."""
    return all(each.device.type in ("cpu", "cuda") for each in parameters.values())
