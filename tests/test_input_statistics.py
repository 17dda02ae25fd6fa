"""The collector of input statistics: gathered in parts and merged, it knows what one collector of all batches knows."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.batch import Batch
from calibration.statistics import ACCUMULATORS, Cross
from prune_cli.engine.input_statistics import InputStatistics

CPU = torch.device("cpu")
INPUTS, OUTPUTS = 4, 3
EVERYTHING = tuple(ACCUMULATORS)
# With the same bytes however the batches are shared out, when they are merged in order.
TO_THE_LAST_BIT = ("sq_norm", "mean", "variance")


@dataclass(frozen=True)
class Passing:
    """One batch at a linear layer: its inputs, the dense model's, and the outputs that it wants of the layer."""

    batch: Batch
    inputs: torch.Tensor
    dense: torch.Tensor
    wanted: torch.Tensor

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of each of its samples the rows that are no padding, one sample below the other, in float64."""
        samples = zip(tensor.double(), self.batch.lengths, strict=True)
        return torch.cat([sample[:length] for sample, length in samples])


@st.composite
def passings(draw: st.DrawFn, least: int = 0) -> list[Passing]:
    """Batches of samples of different lengths, some padded, with inputs far from centred; no padding is finite."""
    found = []
    for seed in range(draw(st.integers(least, 5))):
        lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        generator = torch.Generator().manual_seed(seed)
        inputs, dense, wanted = (torch.randn(*mask.shape, n, generator=generator) for n in (INPUTS, INPUTS, OUTPUTS))
        inputs += 3
        for tensor in (inputs, dense, wanted):
            tensor[~mask] = torch.nan
        found.append(Passing(Batch(mask.long(), None if mask.all() else mask), inputs, dense, wanted))
    return found


def collector(everything: Sequence[Passing], *, constant: bool = False) -> InputStatistics:
    count = sum(each.batch.tokens for each in everything)
    return InputStatistics(EVERYTHING, INPUTS, CPU, with_dense=True, constant=constant, sketch_of=count)


def gathered(everything: Sequence[Passing], own: Sequence[int], *, constant: bool = False) -> InputStatistics:
    """What a process that takes the batches `own` of all of them sends to another."""
    found = collector(everything, constant=constant)
    for number, each in enumerate(everything):
        if number in own:
            found.add(each.inputs, each.dense, each.batch)
        else:
            found.skip(each.batch.tokens)
    return pickle.loads(pickle.dumps(found))


def merged(parts: Sequence[InputStatistics]) -> InputStatistics:
    def both(left: InputStatistics, right: InputStatistics) -> InputStatistics:
        left.merge(right)
        return left

    return reduce(both, parts)


def naive(everything: Sequence[Passing], *, constant: bool) -> dict[str, torch.Tensor]:
    """The statistics in float64, from all rows at once."""
    x = torch.cat([each.real(each.inputs) for each in everything])
    y = torch.cat([each.real(each.dense) for each in everything])
    samples = [row for each in everything for row in each.real(each.inputs).split(list(each.batch.lengths))]
    wide = [torch.cat([rows, torch.ones(len(rows), 1)], 1) if constant else rows for rows in (x, y)]
    return {
        "sq_norm": x.square().sum(0),
        "mean": x.mean(0),
        "variance": x.var(0, unbiased=False),
        "gram": wide[0].T @ wide[0],
        "cross": wide[1].T @ wide[0],
        "sample_sum": torch.stack([sample.sum(0) for sample in samples]).mean(0),
        "within_variance": sum(len(s) * s.var(0, unbiased=False) for s in samples) / torch.tensor(len(x)),
        "tokens": torch.tensor(float(len(x))),
    }


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-4)


@settings(max_examples=30, deadline=None)
@given(everything=passings(least=1), shares=st.lists(st.integers(0, 2), min_size=5, max_size=5), constant=st.booleans())
def test_merged_parts_equal_the_whole(everything: list[Passing], shares: list[int], constant: bool) -> None:
    numbers = range(len(everything))
    parts = [gathered(everything, [n for n in numbers if shares[n] == part], constant=constant) for part in range(3)]
    together = merged(parts)
    expected = naive(everything, constant=constant)
    for statistics in (together, gathered(everything, numbers, constant=constant)):
        values = statistics.values()
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert value.dtype == torch.float32
            assert_near(value, expected[name])
    # Few tokens are their own sketch, but for signs.
    x = torch.cat([each.real(each.inputs) for each in everything])
    assert torch.equal(together.rows().abs().double(), x.abs())


@settings(max_examples=30, deadline=None)
@given(everything=passings())
def test_batches_merged_in_order_give_the_same_bytes(everything: list[Passing]) -> None:
    numbers = range(len(everything))
    by_batch = merged([collector(everything), *(gathered(everything, [number]) for number in numbers)])
    whole = gathered(everything, numbers)
    for name in TO_THE_LAST_BIT:
        assert torch.equal(by_batch.values()[name], whole.values()[name])
    assert torch.equal(by_batch.rows(), whole.rows())


@settings(max_examples=30, deadline=None)
@given(everything=passings(), constant=st.booleans())
def test_an_empty_part_changes_nothing(everything: list[Passing], constant: bool) -> None:
    numbers = range(len(everything))
    whole = gathered(everything, numbers, constant=constant)
    parts = [gathered(everything, own, constant=constant) for own in ([], numbers, [])]
    for statistics in (merged(parts[:2]), merged(parts[1:])):
        for name, value in whole.values().items():
            assert torch.equal(statistics.values()[name], value)
        assert torch.equal(statistics.rows(), whole.rows())


@settings(max_examples=30, deadline=None)
@given(everything=passings(least=1), at=st.integers(0, 5), constant=st.booleans())
def test_the_output_cross_is_merged_like_the_statistics(everything: list[Passing], at: int, constant: bool) -> None:
    statistics = collector(everything, constant=constant)

    def output_cross(part: list[Passing]) -> Cross:
        wanted = [p.real(p.wanted) for p in part]
        return statistics.output_cross(OUTPUTS, wanted, [p.inputs for p in part], [p.batch for p in part])

    expected = torch.zeros(OUTPUTS, INPUTS + constant, dtype=torch.float64)
    for each in everything:
        x = each.real(each.inputs)
        expected += each.real(each.wanted).T @ (torch.cat([x, torch.ones(len(x), 1)], 1) if constant else x)
    whole = output_cross(everything)
    assert_near(whole.value(), expected)
    if 0 < at < len(everything):
        half, other = output_cross(everything[:at]), output_cross(everything[at:])
        half.merge(other)
        assert_near(half.value(), expected)


def test_values_follow_what_is_added_after_them() -> None:
    rows = torch.randn(6, INPUTS, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics(("sq_norm", "gram"), INPUTS, CPU)
    statistics.add_rows(rows[:2])
    statistics.values()
    statistics.add_rows(rows[2:])
    assert_near(statistics.values()["sq_norm"], rows.square().sum(0))
    statistics.merge(pickle.loads(pickle.dumps(statistics)))
    assert_near(statistics.values()["gram"], 2 * rows.T @ rows)


def test_large_means_keep_their_digits_when_merged() -> None:
    rows = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) + 10_000
    parts = [InputStatistics(("variance",), 1, CPU) for _ in range(4)]
    for part, own in zip(parts, rows.split(100), strict=True):
        part.add_rows(own)
    expected = rows.double().var(0, unbiased=False)
    torch.testing.assert_close(merged(parts).values()["variance"].double(), expected, rtol=1e-6, atol=0)


def test_what_cannot_be_merged_is_refused() -> None:
    plain = InputStatistics(("sq_norm",), INPUTS, CPU)
    for other in (
        InputStatistics(("mean",), INPUTS, CPU),
        InputStatistics(("sq_norm",), 1, CPU),
        InputStatistics(("sq_norm",), INPUTS, CPU, sketch_of=3),
    ):
        with pytest.raises(ValueError, match="different kinds"):
            plain.merge(other)
    sketches = [InputStatistics((), INPUTS, CPU, sketch_of=4) for _ in range(2)]
    for sketch in sketches:
        sketch.add_rows(torch.ones(2, INPUTS))
    with pytest.raises(ValueError, match="must skip"):
        sketches[0].merge(sketches[1])
