"""How much a hidden unit matters: the rules of the papers, each a number per unit from weights and their inputs.

Statistics are of the consuming linear layer's inputs: `sq_norm` and `variance` (in,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from methods._torch import torch
from methods.structured._units import Units

Score = Callable[[Units, Mapping[str, "torch.Tensor"]], "torch.Tensor"]


def magnitude(units: Units, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The squares of all weights that belong to a unit."""
    made = sum((producer.square().sum((1, 2)) for producer in units.producers), torch.zeros(()))
    return units.of_inputs(units.consumer.square().sum(0)) + made


def wanda(units: Units, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of abs(W_ij) ||x_j|| over a unit's inputs j and all outputs i (arXiv:2306.11695, for whole units)."""
    return units.of_inputs(units.consumer.abs().sum(0) * statistics["sq_norm"].sqrt())


def flap(units: Units, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Var(x_j) ||W_:,j||^2, the mean over a unit's inputs (arXiv:2312.11983)."""
    return units.of_inputs(statistics["variance"] * units.consumer.square().sum(0)) / units.width


def cfsp(units: Units, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The fine score of CFSP (arXiv:2409.13199): a unit's share of the weights at every hidden index, times ||x_j||.

    The consumer's share is one of abs(W_ij) ||x_j||. Of a head, the producers' shares are those of all its rows.
    """
    norm = statistics["sq_norm"].sqrt()
    used = units.consumer.abs() * norm
    share = (used / used.sum(1, keepdim=True).clamp_min(torch.finfo(used.dtype).tiny)).mean(0)
    made = torch.zeros(units.count, device=share.device)
    for producer in units.producers:
        size = producer.abs().sum(1)
        made += (size / size.sum(0).clamp_min(torch.finfo(size.dtype).tiny)).mean(1)
    return units.of_inputs((share + made.repeat_interleave(units.width) / units.width) * norm)


SCORES: dict[str, Score] = {"cfsp": cfsp, "flap": flap, "wanda": wanda, "magnitude": magnitude}
# What each reads; `obs`, which also needs to know what the others can make up for, is in obs.py.
NEEDS: dict[str, tuple[str, ...]] = {
    "cfsp": ("sq_norm",),
    "flap": ("variance",),
    "wanda": ("sq_norm",),
    "magnitude": (),
}
