"""Experts that go are averaged into those that stay and are most like them: REAM, arXiv:2604.04356.

The hidden units of two experts have no common order, so those of one are put in the order of the other's first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from methods._precision import widest
from methods._torch import torch

# Experts that become one.
_MOST = 16
# Of the auction: bids start this coarse and end this fine, as shares of the spread of the benefits.
_FIRST_STEP, _LAST_STEP, _FINER = 0.25, 1e-4, 5.0


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


def assignment(benefits: torch.Tensor) -> torch.Tensor:
    """(n,): a column of its own for each row of `benefits` (n, n), with nearly the largest sum there is.

    Bertsekas' auction with bids that get finer: the sum is at most n/10,000 of the spread of the benefits too low.
    """
    count = len(benefits)
    values = benefits.to(widest(benefits.device))
    spread = float(values.max() - values.min())
    columns = torch.arange(count, device=values.device)
    if count < 2 or not spread > 0:
        return columns
    prices, step = torch.zeros(count, dtype=values.dtype, device=values.device), _FIRST_STEP
    while True:
        columns = _auction(values, prices, step * spread)
        if step <= _LAST_STEP:
            return columns
        step = max(step / _FINER, _LAST_STEP)


def _auction(values: torch.Tensor, prices: torch.Tensor, step: float) -> torch.Tensor:
    """One round: rows without a column bid until all have one; `prices` (n,) rise."""
    count = len(values)
    owner = torch.full((count,), -1, dtype=torch.long, device=values.device)
    columns = owner.clone()
    while len(rows := (columns < 0).nonzero().flatten()):
        worth = values[rows] - prices
        best = worth.topk(2, dim=1)
        wanted = best.indices[:, 0]
        bids = prices[wanted] + best.values[:, 0] - best.values[:, 1] + step
        highest = torch.full_like(prices, float("-inf")).scatter_reduce(0, wanted, bids, "amax")
        # Of equal bids that of the first row.
        first = torch.full_like(owner, count)
        first.scatter_reduce_(0, wanted, torch.where(bids == highest[wanted], rows, count), "amin")
        sold = (first < count).nonzero().flatten()
        losers = owner[sold]
        columns[losers[losers >= 0]] = -1
        owner[sold] = first[sold]
        columns[first[sold]] = sold
        prices[sold] = highest[sold]
    return columns


def averaged(parts: Mapping[str, Sequence[torch.Tensor]], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """By name, the mean of several experts' matrices, already in one order, each with its weight."""
    share = torch.tensor(weights, dtype=torch.float64)
    share = (share / share.sum() if float(share.sum()) > 0 else torch.full_like(share, 1 / len(share))).tolist()
    return {
        name: sum((each * part for each, part in zip(share, of_all, strict=True)), torch.zeros_like(of_all[0]))
        for name, of_all in parts.items()
    }
