"""Experts that go are averaged into those that stay and are most like them: REAM, arXiv:2604.04356.

The hidden units of two experts have no common order, so those of one are put in the order of the other's first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from methods._precision import widest
from methods._torch import torch

# Experts that become one.
_MOST = 16


def likeness(outputs: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """(experts, experts): half the cosine of their mean `outputs`, half that of their rows of the `router`.

    Both are (experts, hidden).
    """
    parts = [torch.nn.functional.normalize(each.to(widest(each.device)), dim=1) for each in (outputs, router)]
    return 0.5 * sum((part @ part.T for part in parts), torch.zeros((), device=outputs.device))


def groups(like: torch.Tensor, kept: Sequence[int]) -> dict[int, list[int]]:
    """By each of `kept` the experts that go and become one with it: the likest pairs first, up to 16 in a group.

    `like` is (experts, experts). What finds no room in any group is in none.
    """
    gone = [expert for expert in range(len(like)) if expert not in kept]
    pairs = sorted((-float(like[a, b]), a, b) for a in gone for b in kept)
    found: dict[int, list[int]] = {expert: [] for expert in kept}
    placed: set[int] = set()
    for _, expert, into in pairs:
        if expert not in placed and len(found[into]) < _MOST - 1:
            found[into].append(expert)
            placed.add(expert)
    return found


def unit_likeness(units: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(units, units): the cosine of all weights of each hidden unit of one expert, (units, weights), with another's."""
    a, b = (torch.nn.functional.normalize(each, dim=1) for each in (units, others))
    return a @ b.T


def averaged(parts: Mapping[str, Sequence[torch.Tensor]], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """By name, the mean of several experts' matrices, already in one order, each with its weight."""
    share = torch.tensor(weights, dtype=torch.float64)
    share = (share / share.sum() if float(share.sum()) > 0 else torch.full_like(share, 1 / len(share))).tolist()
    return {
        name: sum((each * part for each, part in zip(share, of_all, strict=True)), torch.zeros_like(of_all[0]))
        for name, of_all in parts.items()
    }
