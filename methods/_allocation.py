"""How much each tensor gives: from a wish or a measurement to a table of sparsities that keeps the budget.

Everywhere `counts` are weights per tensor (or block) and `asked` is the sparsity that the weighted mean must have.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

from methods._precision import widest
from methods._torch import torch

# No tensor keeps less than this share of the density that was asked for: an empty layer would cut the model in two.
_LEAST_KEPT = 0.02
_BISECTIONS = 200
# As in NanoQuant's shrinkage of such statistics.
_TO_MEAN = 0.2
# Bins of a histogram of scores: the sign-free top 16 bits of a float32, a bin per 0.8 % or less.
_BIN_SHIFT = 15
_BINS = 1 << 16
_MOST_INT32 = 1 << 31
# Scores of less than 2**-24 of the largest share a bin.
_KEPT_BINS = 24 << 8


def to_budget(
    wished: Mapping[str, float], counts: Mapping[str, int], asked: float, spread: float = 1.0
) -> dict[str, float]:
    """`wished` sparsities moved by one constant so that the weighted mean is `asked`.

    They are kept in their bounds, and within `spread` of `asked`.
    """
    least, most = max(asked - spread, 0.0), min(asked + spread, _most(asked))

    def moved(shift: float) -> dict[str, float]:
        return {name: min(max(value + shift, least), most) for name, value in wished.items()}

    return _bisect(moved, counts, asked, -max(wished.values()), 1 - min(wished.values()))


def erk(
    shapes: Mapping[str, tuple[int, int]], asked: float, counts: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Densities in proportion to (in + out) / (in * out), none above 1 (Mocanu et al. 2018; Evci et al. 2020).

    `shapes` are (out, in); `counts` are needed where tensors hold several linear layers of that shape.
    """
    ratio = {name: (rows + inputs) / (rows * inputs) for name, (rows, inputs) in shapes.items()}
    counts = counts or {name: rows * inputs for name, (rows, inputs) in shapes.items()}
    most = _most(asked)

    def scaled(log_scale: float) -> dict[str, float]:
        # A greater argument must mean a greater sparsity, so the density shrinks with it.
        return {name: min(max(1 - 2.0**-log_scale * value, 0.0), most) for name, value in ratio.items()}

    return _bisect(scaled, counts, asked, -64.0, 64.0)


def outlier_share(scores: Sequence[torch.Tensor], times: float) -> float:
    """The share of a block's scores, all its linear layers (out, in) together, above `times` their mean."""
    total = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=widest(score.device))) for score in scores) / total
    return sum(int((score > times * mean).count_nonzero()) for score in scores) / total


def owl(shares: Mapping[str, float], counts: Mapping[str, int], asked: float, spread: float) -> dict[str, float]:
    """Blocks with more outliers keep more: up to `spread` either side, recentred to the budget."""
    least, most = min(shares.values()), max(shares.values())
    across = most - least or 1.0
    wished = {name: asked - 2 * spread * (share - least) / across for name, share in shares.items()}
    return to_budget(wished, counts, asked)


def arithmetic(counts: Mapping[str, int], asked: float, slope: float) -> dict[str, float]:
    """Sparsities that grow by `slope` from each of the ordered `counts` to the next."""
    middle = (len(counts) - 1) / 2
    return to_budget({name: asked + slope * (at - middle) for at, name in enumerate(counts)}, counts, asked)


def steepest_slope(blocks: int, asked: float) -> float:
    """The slope at which the first block stays whole or the last is gone."""
    return 2 * min(asked, 1 - asked) / max(blocks - 1, 1)


def shrunk(outputs: torch.Tensor) -> torch.Tensor:
    """Squared sensitivities (out,) drawn to their mean a little: they are estimates, and of the dense model."""
    return outputs.lerp(outputs.mean(), _TO_MEAN)


def output_scores(weight: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """What the block's output loses without each weight (out, in), squared, if inputs are independent of each other.

    `outputs` (out,) are squared derivatives, `inputs` (in,) squares, both summed over tokens.
    """
    return weight.square() * shrunk(outputs)[:, None] * inputs


class ScoreHistogram:
    """Scores of many tensors under one threshold, without keeping them: counts per tensor and bin."""

    def __init__(self) -> None:
        # Of each tensor the first bin that holds any, and how many scores lie up to each from there on.
        self._below: dict[str, tuple[int, torch.Tensor]] = {}

    def add(self, name: str, score: torch.Tensor) -> None:
        """Take in the non-negative scores (out, in) of one tensor."""
        bits = (score.float().contiguous().view(torch.int32) >> _BIN_SHIFT).reshape(-1)
        first = max(int(bits.min()), int(bits.max()) - _KEPT_BINS)
        below = torch.bincount((bits - first).clamp_(min=0)).cumsum(0).cpu()
        # One for each tensor of the model is kept.
        self._below[name] = first, below.int() if len(bits) < _MOST_INT32 else below

    def sparsities(self, asked: float, among: Container[str] | None = None) -> dict[str, float]:
        """The share of every tensor (`among` some) below the threshold that takes `asked` of all weights together."""
        most = _most(asked)
        chosen = {name: each for name, each in self._below.items() if among is None or name in among}
        counts = {name: int(below[-1]) for name, (_, below) in chosen.items()}

        def under(threshold: float) -> dict[str, float]:
            whole = min(int(threshold), _BINS - 1)
            shares = {}
            for name, each in chosen.items():
                before, here = _up_to(*each, whole - 1), _up_to(*each, whole)
                shares[name] = min((before + (threshold - whole) * (here - before)) / counts[name], most)
            return shares

        return _bisect(under, counts, asked, 0.0, float(_BINS))


def _up_to(first: int, below: torch.Tensor, index: int) -> int:
    """How many scores lie in bins up to `index`."""
    return 0 if index < first else int(below[min(index - first, len(below) - 1)])


def mean_sparsity(sparsity: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Weighted with the counts of weights."""
    return sum(value * counts[name] for name, value in sparsity.items()) / sum(counts[name] for name in sparsity)


def _most(asked: float) -> float:
    return 1 - _LEAST_KEPT * (1 - asked)


def _bisect(
    table: Callable[[float], dict[str, float]], counts: Mapping[str, int], asked: float, low: float, high: float
) -> dict[str, float]:
    """The `table(x)`, monotone in x, whose weighted mean is `asked`."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if mean_sparsity(table(middle), counts) < asked:
            low = middle
        else:
            high = middle
    return table(high)
