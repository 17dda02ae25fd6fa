"""Which weights of a linear layer compete with each other, and how many of them go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from methods._torch import torch

# From this many values on, bounds from a sample make a selection faster; and how many values to sample.
_LONG_ROW, _SAMPLE = 1 << 18, 1 << 15


@dataclass(frozen=True)
class Unstructured:
    """Any positions: the fraction `sparsity` of every row, or of the whole tensor at once."""

    sparsity: float
    per: Literal["row", "tensor"] = "row"

    def __str__(self) -> str:
        return f"{self.sparsity:g}"


@dataclass(frozen=True)
class NofM:
    """`keep` weights stay of every `of` consecutive inputs (2:4 in the language of the hardware)."""

    keep: int
    of: int

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


Pattern = Unstructured | NofM


def pruned_count(sparsity: float, competitors: int) -> int:
    """How many of `competitors` weights go; the tiny term keeps 0.7 of 10 at 7 in floating point."""
    return math.floor(sparsity * competitors + 1e-9)


def keep_highest(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Boolean keep-mask (out, in) of the highest scores under `pattern`.

    Exact counts; of equal scores the lower column goes first (for `per="tensor"`: the lower position in row-major
    order). Raises ValueError where the number of inputs is no multiple of M.
    """
    outputs, inputs = score.shape
    if isinstance(pattern, NofM):
        if inputs % pattern.of:
            raise ValueError(f"{inputs} inputs are no multiple of {pattern.of}, as the pattern {pattern} needs")
        groups = score.reshape(-1, pattern.of)
        return ~_lowest_of_small_groups(groups, pattern.of - pattern.keep).reshape(outputs, inputs)
    if pattern.per == "tensor":
        row = score.reshape(1, -1)
        return ~_lowest(row, pruned_count(pattern.sparsity, row.shape[1])).reshape(outputs, inputs)
    return ~_lowest(score, pruned_count(pattern.sparsity, inputs))


def keep_highest_count(score: torch.Tensor, pruned: int) -> torch.Tensor:
    """Boolean keep-mask (out, in) without the `pruned` lowest of the whole tensor, ties as in `keep_highest`."""
    return ~_lowest(score.reshape(1, -1), pruned).reshape(score.shape)


def zeroed(weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`weight` (float32) with +0.0 where `keep` is false, the bits of all others unchanged."""
    # Five times as fast as `where` on a CPU, and unlike a product of floats it leaves no -0.0.
    return (weight.view(torch.int32) * keep).view(torch.float32)


def infinite(score: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """`score` (float32) with inf where `where` is true."""
    # Like `zeroed`, several times as fast as `masked_fill` on a CPU; an infinity is all exponent bits.
    return (score.contiguous().view(torch.int32) * ~where + where.int() * 0x7F800000).view(torch.float32)


def _lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` lowest of each row. A selection, because sorting costs as much as a forward pass on a CPU."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = _kth_lowest(score, count)
    lowest = score <= threshold
    if int(lowest.count_nonzero()) == count * len(score):
        return lowest
    below = score < threshold
    tied = score == threshold
    room = count - below.sum(1, keepdim=True)
    return below | (tied & (tied.cumsum(1) <= room))


def _kth_lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """The `count`-th lowest of each row (rows, 1)."""
    if score.device.type != "cpu":
        return score.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    # torch's selections take four times as long on a CPU as the one behind the array that it shares.
    if len(score) == 1 and score.shape[1] > _LONG_ROW:
        return score.new_full((1, 1), _kth_lowest_of_long(score[0].numpy(), count))
    rows = score.clone()
    rows.numpy().partition(count - 1, axis=1)
    return rows[:, count - 1 : count]


def _kth_lowest_of_long(values: Any, count: int) -> float:
    """The `count`-th lowest of an array: a sample tells within which bounds to look, so few values are moved."""
    sample = values[:: len(values) // _SAMPLE | 1].copy()
    sample.sort()
    at, margin = count * len(sample) // len(values), 4 * math.isqrt(len(sample))
    low, high = sample[max(at - margin, 0)], sample[min(at + margin, len(sample) - 1)]
    inside = values.compress((values >= low) & (values <= high))
    left = count - int((values < low).sum())
    if not 1 <= left <= len(inside):  # the sample is no picture of all
        inside, left = values.copy(), count
    inside.partition(left - 1)
    return float(inside[left - 1])


def _lowest_of_small_groups(groups: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` lowest of each row of (groups, M), M small: rank = how many neighbours go earlier."""
    columns = groups.unbind(1)
    lowest = torch.empty_like(groups, dtype=torch.bool)
    for j, column in enumerate(columns):
        rank = torch.zeros_like(column, dtype=torch.int16)
        for i, other in enumerate(columns):
            if i != j:
                rank += (other <= column) if i < j else (other < column)
        lowest[:, j] = rank < count
    return lowest
