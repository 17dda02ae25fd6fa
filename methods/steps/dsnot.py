"""Prune-and-grow: weights change places until the expected error of a row is gone (DSnoT, arXiv:2310.08915)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from methods._method import Pruned, Step
from methods._pattern import NofM, Pattern, infinite, zeroed
from methods._torch import torch

_FEW_CYCLES = 16


@dataclass(frozen=True)
class Options:
    max_cycles: int = field(default=50, metadata={"help": "exchanges in a row at most", "least": 1})
    threshold: float = field(
        default=0.1,
        metadata={"help": "a row is done once its expected error is below this share of its error's size", "least": 0},
    )
    power: float = field(default=1.0, metadata={"help": "of the variance that growing divides by", "least": 0})
    stop: Literal["error", "sign", "never"] = field(
        default="error",
        metadata={
            "help": "when a row stops early: error, where an exchange would not lower its estimated squared error; "
            "sign, where the expected error would change its sign; never: only the threshold stops it"
        },
    )


def improve(
    weight: torch.Tensor,
    pruned: Pruned,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    options: Options,
) -> Pruned:
    """Exchange places of `pruned.keep` (out, in), one pair a cycle in every row; section 3.2 of the paper.

    A row's expected error is e = sum of w_j mean_j over its pruned weights. Grown is the pruned weight whose w_j mean_j
    / variance_j^power lowers |e| most; pruned, of the kept ones whose loss lowers |e| too, the one with the lowest
    |w_j| ||X_j|| (for N:M, in the same group). No weight moves twice. The row's estimated squared error, by which it is
    judged, is e^2 + sum of w_j^2 variance_j: inputs taken as uncorrelated. `sq_norm`, `mean`, `variance` are (in,).
    """
    error, threshold = _expected_error(weight, pruned.keep, statistics, options.threshold)
    keep = pruned.keep.clone()
    todo = (error.abs() > threshold).nonzero()[:, 0]
    # Rows are seldom long on their way, and long queues are costly: those that are begin once more.
    for cycles in sorted({min(_FEW_CYCLES, options.max_cycles), options.max_cycles}):
        if len(todo):
            # `index_select` takes whole rows at a fraction of what an index costs.
            w, k = weight.index_select(0, todo), pruned.keep.index_select(0, todo)
            rows = _Rows(w, k, error[todo], threshold[todo], statistics, replace(options, max_cycles=cycles))
            keep.index_copy_(0, todo, _exchange(rows, pattern, cycles))
            todo = todo[rows.active]
    return Pruned(zeroed(weight, keep), keep, pruned.notes)


def _expected_error(
    weight: torch.Tensor, keep: torch.Tensor, statistics: Mapping[str, torch.Tensor], share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row (rows,): e, and the size that it is done at, `share` of its error's."""
    lost = zeroed(weight, ~keep)
    error = lost @ statistics["mean"]
    return error, share * (error.square() + lost.square() @ statistics["variance"]).sqrt()


def _exchange(rows: _Rows, pattern: Pattern, cycles: int) -> torch.Tensor:
    """The rows' new keep-mask; rows that are still active could do with more cycles."""
    partners = _InGroup(rows, pattern.of) if isinstance(pattern, NofM) else _Anywhere(rows, cycles)
    for _ in range(cycles):
        if not bool(rows.active.any()):
            break
        grown, found = rows.next_to_grow()
        partner, has_partner = partners.next(rows, grown)
        rows.exchange(grown, partner, found & has_partner)
        # Without a partner in its group a weight is passed over; without one in the row, the row is done.
        rows.active &= found if isinstance(partners, _InGroup) else found & has_partner
    return rows.keep


class _Rows:
    """The rows of one layer on their way: masks, expected errors, and the pruned weights in the order of growing."""

    def __init__(
        self,
        weight: torch.Tensor,
        keep: torch.Tensor,
        error: torch.Tensor,
        threshold: torch.Tensor,
        statistics: Mapping[str, torch.Tensor],
        options: Options,
    ) -> None:
        self.keep = keep
        self.error = error
        self.contribution = weight * statistics["mean"]
        self.score = weight.abs() * statistics["sq_norm"].sqrt()
        self.spread = weight.square() * statistics["variance"]
        self._options = options
        lost = zeroed(self.contribution, ~keep)
        self._threshold = threshold
        self._sign = self.error.sign()
        self.active = torch.ones_like(error, dtype=torch.bool)
        per_variance = lost / statistics["variance"].clamp_min(torch.finfo(weight.dtype).tiny).pow(options.power)
        # Side 0 for e <= 0, where a negative contribution is to be grown, side 1 for e > 0.
        self._order = _Queues([(per_variance, lost < 0), (-per_variance, lost > 0)], options.max_cycles)

    def side(self) -> torch.Tensor:
        return (self.error > 0).long()

    def next_to_grow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows,) the place to grow, and whether there is one left that lowers |e|."""
        return self._order.next(self.side())

    def exchange(self, grown: torch.Tensor, partner: torch.Tensor, possible: torch.Tensor) -> None:
        """Grow and prune where `possible` and the stop rule agrees; a row that it stops is not active any more."""
        up, down = grown[:, None], partner[:, None]
        after = self.error + (self.contribution.gather(1, down) - self.contribution.gather(1, up))[:, 0]
        if self._options.stop == "error":
            change = (self.spread.gather(1, down) - self.spread.gather(1, up))[:, 0]
            agreed = after.square() - self.error.square() + change < 0
        elif self._options.stop == "sign":
            agreed = after.sign() == self._sign
        else:
            agreed = torch.ones_like(possible)
        done = self.active & possible & agreed
        self.active &= agreed | ~possible
        row = done.nonzero()[:, 0]
        self.keep[row, grown[row]] = True
        self.keep[row, partner[row]] = False
        self.error = torch.where(done, after, self.error)
        self.active &= self.error.abs() > self._threshold


class _Queues:
    """Two queues of places in every row; each place is handed out once."""

    def __init__(self, sides: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        """For either side the values (rows, in), lowest first, and which places take part; at most `length` of each."""
        queues = [_lowest_places(infinite(values, ~takes_part), length) for values, takes_part in sides]
        self._places = torch.stack([places for places, _ in queues], dim=1)
        self._many = torch.stack([many for _, many in queues], dim=1)
        self._taken = torch.zeros_like(self._many)

    def next(self, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next place of each row's queue `side` (rows,), and whether there was one."""
        row = torch.arange(len(side), device=side.device)
        taken = self._taken[row, side]
        self._taken[row, side] += 1
        place = self._places[row, side, taken.clamp_max(self._places.shape[2] - 1)]
        return place, taken < self._many[row, side]


class _Anywhere:
    """Partners from the whole row: kept weights whose loss lowers |e|, in the order of their score."""

    def __init__(self, rows: _Rows, length: int) -> None:
        sides = [rows.keep & (rows.contribution > 0), rows.keep & (rows.contribution < 0)]
        self._queues = _Queues([(rows.score, takes_part) for takes_part in sides], length)

    def next(self, rows: _Rows, grown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._queues.next(rows.side())


class _InGroup:
    """Partners from the group of M that the grown weight is in; a weight that was grown is none."""

    def __init__(self, rows: _Rows, of: int) -> None:
        self._of = of
        self._kept_at_first = rows.keep.clone()

    def next(self, rows: _Rows, grown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = grown - grown % self._of
        places = first[:, None] + torch.arange(self._of, device=grown.device)
        contribution = rows.contribution.gather(1, places)
        wanted = torch.where(rows.side()[:, None] == 1, contribution < 0, contribution > 0)
        candidates = wanted & rows.keep.gather(1, places) & self._kept_at_first.gather(1, places)
        score, at = rows.score.gather(1, places).masked_fill(~candidates, torch.inf).min(1)
        return first + at, score.isfinite()


def _lowest_places(values: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the lowest finite values of each row, ascending, ties by column; and how many (rows,)."""
    more = min(length + 1, values.shape[1])
    lowest, places = values.topk(more, dim=1, largest=False, sorted=True)
    many = lowest[:, :length].isfinite().sum(1)
    tied = ((lowest[:, 1:] == lowest[:, :-1]) & lowest[:, 1:].isfinite()).any(1)
    if bool(tied.any()):
        places[tied] = values[tied].sort(dim=1, stable=True).indices[:, :more]
    return places[:, :length], many


STEP = Step(
    changes="mask",
    summary="grows back pruned weights and prunes others in their place until each row's expected error is gone",
    paper="Zhang et al., Dynamic Sparse No Training, arXiv:2310.08915",
    cost="means and variances beside the norms, a few selections a layer",
    needs=("sq_norm", "mean", "variance"),
    improve=improve,
    options=Options,
)
