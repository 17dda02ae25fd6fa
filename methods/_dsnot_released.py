"""DSnoT as its authors' released code does it, for comparisons; what differs from the paper is told with each line."""

from __future__ import annotations

from collections.abc import Mapping

from methods._pattern import NofM, Pattern
from methods._torch import torch


def exchange(
    weight: torch.Tensor,
    keep: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    *,
    max_cycles: int,
    threshold: float,
    power: float,
    stop_on_sign: bool,
) -> torch.Tensor:
    """The mask (out, in) after the exchanges; github.com/zyxxmu/DSnoT, every linear layer refined.

    Means are sums over a sample's tokens (`sample_sum`) and variances those within samples (`within_variance`), so the
    threshold depends on the length. Rows go on through their lists after they have stopped and when a side is used up,
    and then take from what is left: some rows end with more or fewer zeros than asked.
    """
    contribution = weight * statistics["sample_sum"]
    score = (weight.abs() * statistics["sq_norm"].sqrt()).masked_fill(~keep, torch.inf)
    lost = contribution.masked_fill(keep, 0.0)
    error = lost.sum(1, keepdim=True)
    first_sign = error.sign()
    # From the front the weights to grow where the error is negative, from the back where it is positive.
    growing = _Walk((lost / statistics["within_variance"].pow(power)).sort(dim=1, stable=True).indices)
    pruning = _InGroups(score, pattern.of) if isinstance(pattern, NofM) else _ByScore(contribution, score, keep)
    pruned = ~keep
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(max_cycles):
        if not bool(active.any()):
            break
        grown = growing.next(error > 0)
        partner = pruning.next(error, grown)
        after = error + contribution.gather(1, partner) - contribution.gather(1, grown)
        active = active & (error.abs() > threshold)
        if stop_on_sign or isinstance(pattern, NofM):
            active = active & (first_sign == after.sign())
        pruned.scatter_(1, partner, active)
        pruned.scatter_(1, grown, ~active)
        error = torch.where(active, after, error)
    return ~pruned


class _Walk:
    """Places (rows, n) taken one by one from the front or from the back of each row's list."""

    def __init__(self, places: torch.Tensor) -> None:
        self._places = places
        self._taken = torch.zeros(len(places), 2, dtype=torch.long, device=places.device)

    def next(self, from_back: torch.Tensor) -> torch.Tensor:
        side = from_back.long()
        taken = self._taken.gather(1, side)
        self._taken.scatter_add_(1, side, torch.ones_like(side))
        last = self._places.shape[1] - 1
        return self._places.gather(1, torch.where(from_back, last - taken, taken).clamp(0, last))


class _ByScore:
    """Kept weights by their score: those that lower a positive error from the front, the others from the back."""

    def __init__(self, contribution: torch.Tensor, score: torch.Tensor, keep: torch.Tensor) -> None:
        kept = int(keep[0].sum())
        by_score = score.sort(dim=1, stable=True).indices[:, :kept]
        sign = contribution.gather(1, by_score).sign()
        rank = torch.arange(kept, device=keep.device).expand_as(by_score)
        # Negative ones first in their order, positive ones last in the reverse of it.
        order = torch.where(sign < 0, rank - kept, torch.where(sign > 0, kept - rank, 0)).argsort(dim=1, stable=True)
        places = by_score.gather(1, order)
        self._walk = _Walk(torch.where(sign.gather(1, order) == 0, by_score[:, :1], places))

    def next(self, error: torch.Tensor, grown: torch.Tensor) -> torch.Tensor:
        return self._walk.next(error < 0)


class _InGroups:
    """The kept weight with the lowest score in the group of the grown one, whatever its sign; each is offered once."""

    def __init__(self, score: torch.Tensor, of: int) -> None:
        self._score = score
        self._of = of

    def next(self, error: torch.Tensor, grown: torch.Tensor) -> torch.Tensor:
        first = grown - grown % self._of
        places = first + torch.arange(self._of, device=grown.device)
        partner = first + self._score.gather(1, places).argmin(1, keepdim=True)
        self._score.scatter_(1, partner, torch.inf)
        return partner
