"""Fits a run into the memory that it may take, or that is free: more of its hidden states wait elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from prune_cli.engine.activation_budget import USUAL, ActivationBudget
from prune_cli.engine.estimated_memory import Estimate, Part
from prune_cli.engine.memory import free_on_device, free_on_host
from prune_cli.engine.open_model import OpenModel
from prune_cli.errors import RequestError
from prune_cli.ranks.ranks import Ranks
from prune_cli.report.format import size
from prune_cli.report.memory import MemoryPlan
from prune_cli.request.sizes import parse_size

# Of hidden states, in bytes: each half of the one before, and none at all.
_BUDGETS = (*(1 << power for power in range(40, 19, -1)), 0)
_NAMED_PARTS, _WORTH_CHANGING = 3, 0.05

Opened = TypeVar("Opened", bound=OpenModel)


@dataclass(frozen=True)
class _Limits:
    """Bytes of this process; None where there is none or it cannot be told."""

    host: int | None
    device: int | None

    def hold(self, estimate: Estimate, budget: ActivationBudget) -> bool:
        host, device = estimate.host(budget), estimate.device(budget)
        fits = self.host is None or host <= self.host
        return fits and (self.device is None or device is None or device <= self.device)


def within_memory(opened: Opened, estimate: Estimate) -> Opened:
    """`opened` with a budget of hidden states with which it fits; of several ranks the first one decides.

    Raises RequestError where it fits --limit-memory with none. With what is free just now it then goes on with a
    warning: an estimate may be too high, and other programs may end.
    """
    asked, device = opened.request.limit_memory, opened.device
    memory, warnings = opened.ranks.on_first(lambda: fitted(asked, device, opened.ranks, estimate))
    return replace(opened, memory=memory, warnings=(*opened.warnings, *warnings))


def fitted(
    asked: str | None, device: torch.device, ranks: Ranks, estimate: Estimate
) -> tuple[MemoryPlan | None, tuple[str, ...]]:
    """What a run on `device` is fitted into, None where it is as usual, and warnings; raises as `within_memory`."""
    limits = _limits(asked, device, ranks)
    if asked is None and limits.hold(estimate, USUAL):
        return None, ()
    hidden_states = _hidden_states(estimate, limits)
    budget = ActivationBudget.of(hidden_states)
    warnings: tuple[str, ...] = ()
    if not limits.hold(estimate, budget):
        needed, on_device, told = _shortage(estimate, limits, budget)
        if asked is not None:
            raise RequestError(
                f"--limit-memory is {asked}, but {told}, however few hidden states wait in memory: "
                f"{_advice(estimate, budget, device=on_device)}allow {math.ceil(needed / 1e6)}MB."
            )
        warnings = (f"{told[0].upper()}{told[1:]}, more than is free: the system may end the run.",)
    estimates = estimate.host(budget), estimate.device(budget)
    return MemoryPlan(asked is not None, limits.host, limits.device, *estimates, hidden_states), warnings


def _limits(asked: str | None, device: torch.device, ranks: Ranks) -> _Limits:
    if asked is not None:
        limit = parse_size("--limit-memory", asked)
        return _Limits(limit, None if device.type == "cpu" else limit)
    return _Limits(free_on_host(-(-ranks.count // ranks.nodes)), free_on_device(device))


def _hidden_states(estimate: Estimate, limits: _Limits) -> int | None:
    """The most with which it fits, None if as usual; where it fits with none, as few as can be."""
    if limits.hold(estimate, USUAL):
        return None
    return next((each for each in _BUDGETS if limits.hold(estimate, ActivationBudget.of(each))), _BUDGETS[-1])


def _shortage(estimate: Estimate, limits: _Limits, budget: ActivationBudget) -> tuple[int, bool, str]:
    """Bytes that are too many, whether of the device, and the beginning of a sentence that tells of what they are."""
    device = estimate.device(budget)
    on_device = device is not None and limits.device is not None and device > limits.device
    needed, where = (device, " on the device") if on_device and device is not None else (estimate.host(budget), "")
    parts = sorted(_parts(estimate, budget, device=on_device), key=lambda part: -part.nbytes)[:_NAMED_PARTS]
    named = ", ".join(f"{part.what} {size(part.nbytes)}" for part in parts)
    phase = estimate.largest(budget).name
    return needed, on_device, f"{phase} takes about {size(needed)}{where} ({named})"


def _parts(estimate: Estimate, budget: ActivationBudget, *, device: bool) -> Sequence[Part]:
    work = estimate.largest(budget).parts_within(budget)
    if device:
        return work
    return (*estimate.always, *(work if estimate.on_host else ()))


def _advice(estimate: Estimate, budget: ActivationBudget, *, device: bool) -> str:
    """What to change about the largest part of which something can be changed, if that would be seen."""
    every = _parts(estimate, budget, device=device)
    least = _WORTH_CHANGING * sum(part.nbytes for part in every)
    parts = [part for part in every if part.remedy and part.nbytes > least]
    return f"{max(parts, key=lambda part: part.nbytes).remedy}, or " if parts else ""
