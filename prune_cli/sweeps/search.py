"""Candidates of a search over per-block allocations at a fixed total: random ones, and what evolves from the best.

Random search is the baseline that any cleverer search must beat (after Liu et al., "Random Search as a Baseline for
Sparse Neural Network Architecture Search", arXiv:2303.08895). No torch here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from methods._allocation import to_budget

# A random candidate's blocks lie up to this far from the asked sparsity, before the budget moves them all.
_SPREAD = 0.2
# Chosen on quadratic losses of 4 to 28 blocks: fewer and bolder beat more and shyer at budgets of 24 to 48.
_PARENTS, CHILDREN = 2, 4
_SHARE_OF_BUDGET_TO_START, _LEAST_TO_START = 4, 4
_MUTATED_BLOCKS, _MUTATION = 0.3, 0.1
_CROSSED = 0.5

# Sparsity by block; its mean, weighted by the weights to prune, is the asked one.
Table = dict[str, float]


def random_tables(counts: Mapping[str, int], asked: float, number: int, seed: int) -> list[Table]:
    """The first is uniform; each other has a spread of its own, so that near and far are tried. More begin the same."""
    generator = random.Random(seed)
    tables = [dict.fromkeys(counts, asked)]
    while len(tables) < number:
        spread = generator.uniform(0, _SPREAD)
        wished = {block: asked + generator.uniform(-spread, spread) for block in counts}
        tables.append(to_budget(wished, counts, asked))
    return tables[:number]


def start_of_evolution(budget: int) -> int:
    """How many of the random candidates evolution begins with; they count as its own."""
    return min(budget, max(_LEAST_TO_START, budget // _SHARE_OF_BUDGET_TO_START))


def generations(budget: int) -> Iterator[int]:
    """How many candidates are born in each of evolution's generations, until there are `budget`."""
    for begun in range(start_of_evolution(budget), budget, CHILDREN):
        yield min(CHILDREN, budget - begun)


def children(
    judged: Sequence[tuple[float, Table]], counts: Mapping[str, int], asked: float, number: int, seed: int
) -> list[Table]:
    """The next generation from all that were `judged` (loss, table): mutations of the best, some crossed before."""
    generator = random.Random(f"{seed}:{len(judged)}")
    best = [table for _, table in sorted(judged, key=lambda pair: pair[0])[:_PARENTS]]
    born = []
    for _ in range(number):
        wished = dict(generator.choice(best))
        if generator.random() < _CROSSED:
            other = generator.choice(best)
            wished = {block: generator.choice((value, other[block])) for block, value in wished.items()}
        chosen = [block for block in counts if generator.random() < _MUTATED_BLOCKS]
        for block in chosen or [generator.choice(list(counts))]:
            wished[block] += generator.gauss(0, _MUTATION)
        born.append(to_budget(wished, counts, asked))
    return born
