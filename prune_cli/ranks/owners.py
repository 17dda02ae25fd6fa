"""Which rank solves which of the linear layers that can be solved side by side."""

from __future__ import annotations

from collections.abc import Sequence


def solving_cost(out: int, inputs: int) -> int:
    """Multiplications, roughly: a matrix of the inputs is factorised, and every output is solved with it."""
    return inputs**3 + out * inputs**2


def owners(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank for each of `costs`: the dearest first, each to the rank that has least to do yet."""
    loads = [0] * ranks
    found = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        found[place] = loads.index(min(loads))
        loads[found[place]] += costs[place]
    return found
