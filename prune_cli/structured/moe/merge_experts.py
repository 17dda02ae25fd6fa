"""`-o after=merge`: experts that went are averaged into those that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from methods.structured._expert_merge import averaged, groups, likeness, unit_likeness
from prune_cli.model.moe import outputs_of
from prune_cli.structured.moe.both_mixtures import BothMixtures
from prune_cli.structured.moe.expert_matrices import ExpertMatrices
from prune_cli.structured.moe.expert_statistics import sums_at

_DOWN_BIAS = "down bias"


@dataclass(frozen=True)
class DenseExperts:
    """Of the dense block: the `matrices` of its experts, the `kept` ones, and its router's rows (experts, hidden)."""

    matrices: ExpertMatrices
    kept: Sequence[int]
    router: torch.Tensor


def merge_experts(
    both: BothMixtures, targets: Sequence[torch.Tensor], matrices: ExpertMatrices, dense: DenseExperts
) -> list[float]:
    """Put the averages in place; the held-out error with them. Where it is not lower, all is as it was."""
    before, start = matrices.snapshot(), both.error(both.outputs(), targets)
    interleaved = not getattr(both.dense.module, "is_concatenated", True)
    sums = sums_at(both.dense, both.dense_mixture.experts).by_name
    saliency = (sums["gated_norm"] / sums["tokens"].clamp_min(1)).tolist()
    like = likeness(_mean_outputs(both, dense.router), dense.router)
    for number, (expert, others) in enumerate(groups(like, dense.kept).items()):
        if others:
            of_all = _in_one_order([_units(dense.matrices, each, interleaved) for each in (expert, *others)])
            merged = averaged(of_all, [saliency[each] for each in (expert, *others)])
            _put(matrices, number, merged, interleaved)
    error = both.error(both.outputs(), targets)
    if not error < start:
        matrices.restore(before)
    return [error]


def _mean_outputs(both: BothMixtures, like: torch.Tensor) -> torch.Tensor:
    """(experts, hidden) float32, as `like` is, but for their lengths: of each dense expert over its fitted tokens.

    A step of every rank.
    """
    here, sums = both.dense, torch.zeros_like(like, dtype=torch.float32)
    for expert in range(len(like)):
        for batch, tokens, fitted in zip(here.batches, here.tokens_of(expert), both.fitted, strict=True):
            if fitted and len(tokens):
                sums[expert] += outputs_of(here.module, expert, batch.hidden[tokens]).float().sum(0)
    here.ranks.add_up(sums)
    return sums


def _in_one_order(experts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """By name the parts of all `experts`, the units of each in the order of those of the first that they are like."""
    # Of all commands, merging alone needs it.
    from scipy.optimize import linear_sum_assignment

    first, *others = experts
    ordered = {name: [part] for name, part in first.items()}
    for units in others:
        like = unit_likeness(_weights(first), _weights(units)).cpu().numpy()
        order = torch.from_numpy(linear_sum_assignment(like, maximize=True)[1])
        for name, part in units.items():
            ordered[name].append(part if name == _DOWN_BIAS else part[order])
    return ordered


def _weights(units: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(units, weights): all that belongs to each hidden unit, every matrix counting the same."""
    found = [part.reshape(len(part), -1) for name, part in units.items() if name != _DOWN_BIAS]
    return torch.cat([part / part.norm().clamp_min(torch.finfo(part.dtype).tiny) for part in found], 1)


def _units(matrices: ExpertMatrices, expert: int, interleaved: bool) -> dict[str, torch.Tensor]:
    """(units, ...) of every part of an expert; of the last bias, which belongs to no unit, (hidden,)."""
    (down,) = matrices.names(expert, down=True)
    found = {"down": matrices.matrix(down, expert).T}
    units, bias = len(found["down"]), matrices.bias(down, expert)
    if bias is not None:
        found[_DOWN_BIAS] = bias
    for at, name in enumerate(matrices.names(expert, down=False)):
        found[f"up {at}"] = _by_unit(matrices.matrix(name, expert), units, interleaved)
        bias = matrices.bias(name, expert)
        if bias is not None:
            found[f"up bias {at}"] = _by_unit(bias[:, None], units, interleaved)
    return found


def _put(matrices: ExpertMatrices, expert: int, units: Mapping[str, torch.Tensor], interleaved: bool) -> None:
    (down,) = matrices.names(expert, down=True)
    matrices.put(down, expert, units["down"].T, units.get(_DOWN_BIAS))
    for at, name in enumerate(matrices.names(expert, down=False)):
        bias = units.get(f"up bias {at}")
        whole = None if bias is None else _of_units(bias, interleaved).flatten()
        matrices.put(name, expert, _of_units(units[f"up {at}"], interleaved), whole)


def _by_unit(rows: torch.Tensor, units: int, interleaved: bool) -> torch.Tensor:
    """(units, rows of a unit, in): gate and up lie one below the other, or row by row."""
    return rows.view(units, -1, rows.shape[1]) if interleaved else rows.view(-1, units, rows.shape[1]).transpose(0, 1)


def _of_units(units: torch.Tensor, interleaved: bool) -> torch.Tensor:
    return (units if interleaved else units.transpose(0, 1)).reshape(-1, units.shape[2])
