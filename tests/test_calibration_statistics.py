"""Statistics of inputs against float64, however the tokens come in batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.statistics import ACCUMULATORS, Accumulator, Cross, Gram, RowSketch, SquaredNorm, sum_dtype

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Around the number of rows that are summed at once, and more.
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 7, 127, 128, 129, 300]), max_size=6)


def tokens(count: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Inputs as models have them: far from centred, some of them a thousand times larger."""
    scales = torch.logspace(-2, 3, inputs)
    return ((torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed)) + 0.5) * scales).to(dtype)


def feed(accumulator: Accumulator, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    for batch in rows.split(sizes):
        accumulator.add(batch)
    return accumulator.value()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(sizes=SIZES)
def test_squared_norm(dtype: torch.dtype, sizes: list[int]) -> None:
    rows = tokens(sum(sizes), 5, dtype=dtype) / 10
    value = feed(SquaredNorm(5, CPU), rows, sizes)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, rows.double().square().sum(0).float(), rtol=1e-6, atol=0)


def test_squared_norm_of_many_batches_loses_nothing() -> None:
    norm = SquaredNorm(1, CPU)
    norm.add(torch.full((1, 1), 4096.0))
    for _ in range(1000):
        norm.add(torch.full((1, 1), 1.0))
    assert norm.value().item() == 2**24 + 1000, "in float32, each 1 would be lost"


def test_half_precision_does_not_overflow() -> None:
    rows = torch.full((300, 2), 60000.0, dtype=torch.float16)
    expected = rows.double().square().sum(0).float()
    torch.testing.assert_close(feed(SquaredNorm(2, CPU), rows, [150, 150]), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(feed(Gram(2, CPU), rows, [150, 150]).diag(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(sizes=SIZES)
def test_gram(dtype: torch.dtype, sizes: list[int]) -> None:
    rows = tokens(sum(sizes), 5, dtype=dtype) / 10
    x = rows.double()
    value = feed(Gram(5, CPU), rows, sizes)
    # The error of a sum is measured by the sizes of what is summed.
    allowed = 1e-5 * (x.abs().T @ x.abs()) + 1e-30
    assert ((value.double() - x.T @ x).abs() <= allowed).all()


def test_gram_of_two_streams() -> None:
    x, y = tokens(40, 3, seed=1), tokens(40, 3, seed=2)
    cross = Cross(3, 3, CPU)
    cross.add(y[:25], x[:25])
    cross.add(y[25:], x[25:])
    torch.testing.assert_close(cross.value(), (y.double().T @ x.double()).float(), rtol=1e-5, atol=1e-3)


def test_products_in_bands_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.statistics._LEAST_BAND", 3)
    x, y = tokens(40, 11, seed=1), tokens(40, 7, seed=2)
    gram, cross = Gram(11, CPU), Cross(7, 11, CPU)
    for _ in range(2):
        gram.add(x)
        gram.value()
        cross.add(y, x)
    torch.testing.assert_close(gram.value().double(), 2 * x.double().T @ x.double(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(cross.value().double(), 2 * y.double().T @ x.double(), rtol=1e-5, atol=1e-3)


def test_statistics_by_sample() -> None:
    rows = tokens(60, 4)
    samples = rows.double().view(3, 20, 4)
    total, spread = (feed(ACCUMULATORS[name](4, CPU), rows, [20, 20, 20]) for name in ("sample_sum", "within_variance"))
    torch.testing.assert_close(total.double(), samples.sum(1).mean(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(spread.double(), samples.var(1, unbiased=False).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ACCUMULATORS))
def test_inputs_are_not_changed(name: str) -> None:
    rows = tokens(200, 4)
    before = rows.clone()
    ACCUMULATORS[name](4, CPU).add(rows)
    RowSketch(8, 4, CPU, seed=0).add(rows)
    assert torch.equal(rows, before)


def test_sums_are_as_wide_as_the_device_allows() -> None:
    assert [sum_dtype(torch.device(name)) for name in ("cpu", "cuda:1", "mps")] == [
        torch.float64,
        torch.float64,
        torch.float32,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, spare=st.sampled_from([0, 1, 50]), seed=st.integers(0, 99))
def test_a_sketch_with_room_for_all_tokens_is_the_tokens(
    dtype: torch.dtype, sizes: list[int], spare: int, seed: int
) -> None:
    count = sum(sizes)
    rows = tokens(count, 4, dtype=dtype)
    sketch = feed(RowSketch(max(1, count + spare), 4, CPU, seed), rows, sizes)
    assert sketch.dtype == torch.float32
    # Up to signs, which no product R^T R sees, the rows themselves: nothing is rounded.
    assert torch.equal(sketch[:count].abs(), rows.float().abs())
    assert torch.equal((sketch[:count] * rows.float()).sum(1).abs(), rows.float().square().sum(1))
    assert not sketch[count:].any()


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=6), buckets=st.integers(1, 30), seed=st.integers(0, 99))
def test_a_sketch_does_not_depend_on_the_batches(sizes: list[int], buckets: int, seed: int) -> None:
    # Whole numbers, whose sums are exact in any order.
    whole = torch.randint(-8, 9, (sum(sizes), 3), generator=torch.Generator().manual_seed(1)).float()
    one_by_one = feed(RowSketch(buckets, 3, CPU, seed), whole, [1] * len(whole))
    assert torch.equal(feed(RowSketch(buckets, 3, CPU, seed), whole, sizes), one_by_one)
    # The same once more, naively: each token to the bucket whose turn it is.
    signs = feed(RowSketch(max(1, len(whole)), 1, CPU, seed), torch.ones(len(whole), 1), [len(whole)])
    naive = torch.zeros(buckets, 3)
    for token, row in enumerate(whole):
        naive[token % buckets] += signs[token] * row
    assert torch.equal(one_by_one, naive)


def test_a_sketch_is_drawn_with_its_seed() -> None:
    rows = tokens(500, 3)
    one, again, other = (feed(RowSketch(16, 3, CPU, seed), rows, [500]) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_sketch_estimates_without_bias() -> None:
    # Tokens that resemble one another, the worst case for sums of neighbours without signs.
    rows = tokens(1000, 6) / 100
    change = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    exact = (rows.double() @ change.double().T).square().sum().item()
    seeds, buckets = 400, 32
    estimates = []
    for seed in range(seeds):
        sketch = feed(RowSketch(buckets, 6, CPU, seed), rows, [600, 400])
        estimates.append((sketch.double() @ change.double().T).square().sum().item() / exact)
    mean = math.fsum(estimates) / seeds
    spread = math.sqrt(math.fsum((estimate - mean) ** 2 for estimate in estimates) / (seeds - 1))
    assert abs(mean - 1) < 4 * spread / math.sqrt(seeds)
    assert spread < 1.1 * math.sqrt(2 / buckets), "as a count sketch of so many rows promises"
