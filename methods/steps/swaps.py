"""Exact 1-swaps: a kept weight and a pruned one change places while the row's output error falls (arXiv:2512.10922)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from methods._gram import alpha_option, dense_target, follows_dense
from methods._method import Pruned, Step
from methods._pattern import NofM, Pattern, infinite, zeroed
from methods._torch import torch

# A gain must stand out of the rounding of the terms that it is the difference of.
_ROUNDING = 1e-5
# Candidate pairs of this many rows at once fit a CPU's cache.
_ROWS = 1024


@dataclass(frozen=True)
class Options:
    rounds: int = field(default=4, metadata={"help": "how often the candidates of a row are chosen anew", "least": 1})
    candidates: int = field(
        default=16, metadata={"help": "weights of each side (groups, for N:M) in one round", "least": 1}
    )
    alpha: float = alpha_option()


def improve(
    weight: torch.Tensor,
    pruned: Pruned,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    options: Options,
) -> Pruned:
    """Swap positions of `pruned.keep` (out, in) while ||X W^T - X' W_new^T|| falls; kept weights are those of `weight`.

    With q the pruned part of a row and c = q G, dropping p and restoring u changes the row's error by
    2 w_p c_p + w_p^2 G_pp - 2 w_u c_u + w_u^2 G_uu - 2 w_p w_u G_pu. `gram` and, for dense targets, `cross` are
    (in, in), `output_cross` (out, in).
    """
    gram = statistics["gram"]
    target = dense_target(weight, statistics, options.alpha) if follows_dense(statistics) else None
    keep = pruned.keep.clone()
    for rows in torch.arange(len(weight), device=weight.device).split(_ROWS):
        target = None if target is None else target[rows]
        keep[rows] = _improve_rows(weight[rows], keep[rows], gram, target, pattern, options)
    return Pruned(zeroed(weight, keep), keep, pruned.notes)


def _improve_rows(
    weight: torch.Tensor,
    keep: torch.Tensor,
    gram: torch.Tensor,
    target: torch.Tensor | None,
    pattern: Pattern,
    options: Options,
) -> torch.Tensor:
    # What the pruned weights took from the outputs, seen from every input: c = q G.
    missed = (zeroed(weight, ~keep) @ gram) if target is None else target - zeroed(weight, keep) @ gram
    own = weight.square() * gram.diagonal()
    active = torch.arange(len(weight), device=weight.device)
    keep = keep.clone()
    for _ in range(options.rounds):
        # `index_select` takes whole rows at a fraction of what an index costs.
        w, before, along, o = (rows.index_select(0, active) for rows in (weight, keep, missed, own))
        along.mul_(w).mul_(2)
        drop, restore = infinite(o + along, ~before), infinite(o - along, before)
        k = before.clone()
        if isinstance(pattern, NofM):
            _swap_in_groups(w, k, gram, drop, restore, pattern, options.candidates)
        else:
            _swap_anywhere(w, k, gram, drop, restore, options.candidates)
        keep.index_copy_(0, active, k)
        moved = k != before
        if not bool(moved.any()):
            break
        missed.index_add_(0, active, _difference(w, moved, k, gram))
        active = active[moved.any(1)]
    return keep


def _difference(weight: torch.Tensor, moved: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """(rows, in): how c = q G changes with the new mask; of G only the rows of places that moved are read."""
    row, place = moved.nonzero(as_tuple=True)
    many = moved.sum(1)
    value = weight[row, place]
    amount = torch.where(keep[row, place], -value, value)
    return torch.nn.functional.embedding_bag(place, gram, many.cumsum(0) - many, per_sample_weights=amount, mode="sum")


def _swap_anywhere(
    weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, drop: torch.Tensor, restore: torch.Tensor, count: int
) -> None:
    """Swap the best of `count` x `count` pairs of each row in `keep` while one helps."""
    inputs = weight.shape[1]
    drop_value, drop_at = drop.topk(min(count, inputs), dim=1, largest=False)
    restore_value, restore_at = restore.topk(min(count, inputs), dim=1, largest=False)
    scale = _ROUNDING * (drop_value[:, :1].abs() + restore_value[:, :1].abs())
    w_drop, w_restore = weight.gather(1, drop_at), weight.gather(1, restore_at)
    among_drops = 2 * _pairs(gram, drop_at, drop_at) * w_drop[:, :, None] * w_drop[:, None, :]
    among_restores = 2 * _pairs(gram, restore_at, restore_at) * w_restore[:, :, None] * w_restore[:, None, :]
    between = 2 * _pairs(gram, drop_at, restore_at) * w_drop[:, :, None] * w_restore[:, None, :]
    width = restore_at.shape[1]
    row = torch.arange(len(weight), device=weight.device)
    for _ in range(min(drop_at.shape[1], width)):
        change = (drop_value[:, :, None] + restore_value[:, None, :] - between).flatten(1)
        best, at = change.min(1)
        helps = best < -scale[:, 0]
        if not bool(helps.any()):
            break
        p, u = at // width, at % width
        chosen = row[helps]
        p, u = p[helps], u[helps]
        keep[chosen, drop_at[chosen, p]] = False
        keep[chosen, restore_at[chosen, u]] = True
        drop_value[chosen] += among_drops[chosen, p] - between[chosen, :, u]
        restore_value[chosen] += among_restores[chosen, u] - between[chosen, p]
        drop_value[chosen, p] = torch.inf
        restore_value[chosen, u] = torch.inf


def _pairs(gram: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """G[rows[i, a], columns[i, b]] as (i, a, b)."""
    flat = (rows[:, :, None] * len(gram) + columns[:, None, :]).flatten()
    return gram.view(-1).index_select(0, flat).view(*rows.shape, columns.shape[1])


def _swap_in_groups(
    weight: torch.Tensor,
    keep: torch.Tensor,
    gram: torch.Tensor,
    drop: torch.Tensor,
    restore: torch.Tensor,
    pattern: NofM,
    count: int,
) -> None:
    """The best swap of each group of M; of these the best `count` of each row, in `keep`."""
    of = pattern.of
    rows, inputs = weight.shape
    groups = inputs // of
    best, p, u = _best_of_groups(weight, gram, drop, restore, of)
    value, group = best.topk(min(count, groups), dim=1, largest=False)
    p, u = p.gather(1, group), u.gather(1, group)
    w_p, w_u = weight.gather(1, p), weight.gather(1, u)
    # A swap changes the pruned part by v = w_p e_p - w_u e_u; two of them add 2 v G v' to each other's error.
    each_other = 2 * (
        _pairs(gram, p, p) * w_p[:, :, None] * w_p[:, None, :]
        - _pairs(gram, p, u) * w_p[:, :, None] * w_u[:, None, :]
        - _pairs(gram, u, p) * w_u[:, :, None] * w_p[:, None, :]
        + _pairs(gram, u, u) * w_u[:, :, None] * w_u[:, None, :]
    )
    size = drop.gather(1, p).abs() + restore.gather(1, u).abs()
    limit = -_ROUNDING * size.amax(1)
    row = torch.arange(rows, device=weight.device)
    for _ in range(value.shape[1]):
        lowest, at = value.min(1)
        helps = lowest < limit
        if not bool(helps.any()):
            break
        chosen, a = row[helps], at[helps]
        keep[chosen, p[chosen, a]] = False
        keep[chosen, u[chosen, a]] = True
        value[chosen] += each_other[chosen, a]
        value[chosen, a] = torch.inf


def _best_of_groups(
    weight: torch.Tensor, gram: torch.Tensor, drop: torch.Tensor, restore: torch.Tensor, of: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every group of every row (rows, groups): the lowest change of error, and the places p and u that make it."""
    rows, inputs = weight.shape
    groups = inputs // of
    best = torch.full((rows, groups), torch.inf, device=weight.device)
    at = torch.zeros(rows, groups, dtype=torch.long, device=weight.device)
    w, d, r = (values.view(rows, groups, of) for values in (weight, drop, restore))
    for p, u, g in _within(gram, of):
        change = d[:, :, p] + r[:, :, u] - 2 * w[:, :, p] * w[:, :, u] * g
        better = change < best
        best = torch.where(better, change, best)
        at = torch.where(better, p * of + u, at)
    first = torch.arange(groups, device=weight.device) * of
    return best, first + at // of, first + at % of


def _within(gram: torch.Tensor, of: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Every ordered pair of places in a group with G between them, one value for each group."""
    first = torch.arange(0, len(gram), of, device=gram.device)
    for p in range(of):
        for u in range(of):
            if p != u:
                yield p, u, gram[first + p, first + u]


STEP = Step(
    changes="mask",
    summary="swaps kept and pruned weights of a row while its output error falls; kept weights stay as they are",
    paper="Zimmer et al., SparseSwaps, arXiv:2512.10922",
    cost="a Gram matrix per distinct input, one product (out, in) x (in, in)",
    needs=("gram",),
    improve=improve,
    options=Options,
)
