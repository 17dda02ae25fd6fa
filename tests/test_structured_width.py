"""Scores, elimination, refit and sizes of structured width pruning, against naive references."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.statistics import SquaredNorm, Variance
from methods._gram import dense_target
from methods.structured._obs import eliminate, unit_errors
from methods.structured._refit import bias_of_removed, least_squares
from methods.structured._scores import SCORES
from methods.structured._sizes import coarse_shares, proportional_sizes
from methods.structured._units import Units, highest, inputs_of
from tests import reference_structured as reference

OUT, COUNT, HIDDEN, TOKENS = 5, 6, 7, 90


def make(width: int, seed: int = 0) -> tuple[Units, torch.Tensor]:
    """Units with two producers, and inputs of the consumer that depend on each other."""
    random = torch.Generator().manual_seed(seed)
    consumer = torch.randn(OUT, COUNT * width, generator=random)
    producers = (torch.randn(COUNT, width, HIDDEN, generator=random), torch.randn(COUNT, 2, HIDDEN, generator=random))
    mix = torch.randn(COUNT * width, COUNT * width, generator=random) / 6 + torch.eye(COUNT * width)
    x = (torch.randn(TOKENS, COUNT * width, generator=random) + 0.3) @ mix
    return Units(consumer, producers, width), x


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_the_papers_rules(name: str, width: int) -> None:
    units, x = make(width)
    norm, variance = SquaredNorm(x.shape[1], x.device), Variance(x.shape[1], x.device)
    for part in x.split(40):
        norm.add(part)
        variance.add(part)
    found = SCORES[name](units, {"sq_norm": norm.value(), "variance": variance.value()})
    expected = reference.score(name, units.consumer, list(units.producers), x, width)
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_an_error_of_obs_is_what_the_removal_adds_after_the_best_refit(width: int) -> None:
    units, x = make(width)
    target = x @ units.consumer.T + 0.5 * torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(9))
    inverse = torch.linalg.inv((x.T @ x).double())
    errors = unit_errors(inverse, (target.T @ x).double() @ inverse, width, COUNT)
    for unit in range(COUNT):
        gone = list(range(unit * width, (unit + 1) * width))
        rise = reference.error_without(gone, x, target) - reference.error_without([], x, target)
        assert float(errors[unit]) == pytest.approx(rise, rel=1e-4)


@pytest.mark.parametrize("width", [1, 3])
def test_one_at_a_time_is_greedy_on_the_exact_error(width: int) -> None:
    units, x = make(width, seed=1)
    target = x @ units.consumer.T
    left = list(range(COUNT))
    for keep in range(COUNT - 1, 1, -1):
        gone = [unit for unit in range(COUNT) if unit not in left]

        def error(unit: int, gone: list[int] = gone) -> float:
            columns = [u * width + w for u in (*gone, unit) for w in range(width)]
            return reference.error_without(columns, x, target)

        left.remove(min(left, key=error))
        found = eliminate(x.T @ x, target.T @ x, width, COUNT, keep, damping=1e-9, chunk=1)
        assert found.tolist() == left


def test_a_constant_input_always_stays() -> None:
    """The bias is one more input that is always 1."""
    units, x = make(1)
    ones = torch.cat([x, torch.ones(TOKENS, 1)], 1)
    target = x @ units.consumer.T + 3
    kept = eliminate(ones.T @ ones, target.T @ ones, 1, COUNT, 2, damping=1e-9, chunk=1)
    assert int(kept.max()) < COUNT
    pairs = itertools.combinations(range(COUNT), COUNT - 2)
    best = min(reference.error_without(list(gone), ones, target) for gone in pairs)
    gone = [unit for unit in range(COUNT) if unit not in kept.tolist()]
    assert reference.error_without(gone, ones, target) <= 1.5 * best


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), kept=st.sets(st.integers(0, COUNT - 1), min_size=1), dense=st.booleans())
def test_the_refit_is_the_least_squares_solution(seed: int, kept: set[int], dense: bool) -> None:
    units, x = make(1, seed)
    columns = torch.tensor(sorted(kept))
    was = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    statistics = {"gram": x.T @ x} | ({"cross": was.T @ x} if dense else {})
    target = dense_target(units.consumer, statistics, alpha=1.0)
    new, used = least_squares(units.consumer, statistics["gram"], target, columns, damping=0.0)
    target = (was if dense else x) @ units.consumer.T
    expected = torch.linalg.lstsq(x[:, columns].double(), target.double()).solution.T
    assert used == 0
    torch.testing.assert_close(new.double(), expected, rtol=1e-2, atol=1e-3)


def test_damping_pulls_towards_the_dense_weights_and_dead_inputs_do_no_harm() -> None:
    units, x = make(1)
    x[:, 2] = 0
    columns = torch.tensor([0, 2, 5])
    gram = x.T @ x
    target = units.consumer @ gram
    free, _ = least_squares(units.consumer, gram, target, columns, damping=1e-6)
    held, _ = least_squares(units.consumer, gram, target, columns, damping=1e6)
    assert bool(torch.isfinite(free).all())
    torch.testing.assert_close(held, units.consumer[:, columns], rtol=1e-3, atol=1e-3)
    exact, raised = least_squares(units.consumer, gram, target, columns, damping=0.0)
    assert raised == 0
    assert exact[:, 1].abs().max() == 0


def test_flaps_bias_makes_up_for_the_mean_of_what_goes() -> None:
    units, x = make(1)
    kept = torch.tensor([1, 4])
    bias = bias_of_removed(units.consumer, x.mean(0), kept)
    lost = (x @ units.consumer.T).mean(0) - (x[:, kept] @ units.consumer[:, kept].T).mean(0)
    torch.testing.assert_close(bias, lost, rtol=1e-4, atol=1e-4)


def test_units_and_their_inputs() -> None:
    assert inputs_of(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
    assert highest(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


def test_coarse_shares_are_those_of_the_paper_and_do_not_depend_on_the_scale() -> None:
    angles = torch.tensor([0.31, 0.12, 0.1, 0.11, 0.25])
    shares = coarse_shares(angles)
    torch.testing.assert_close(shares, torch.tensor(reference.cfsp_shares(angles.tolist())).double())
    torch.testing.assert_close(shares, coarse_shares(angles * 1e4))
    assert coarse_shares(torch.ones(3)).tolist() == [0.5] * 3


@settings(deadline=None)
@given(
    data=st.data(),
    multiple=st.sampled_from([1, 4, 16]),
    counts=st.lists(st.integers(2, 12), min_size=1, max_size=8),
)
def test_sizes_meet_the_budget(data: st.DataObject, multiple: int, counts: list[int]) -> None:
    counts = [count * multiple for count in counts]
    keep = data.draw(st.integers(len(counts), sum(counts) // multiple)) * multiple
    shares = torch.tensor(data.draw(st.lists(st.floats(0.05, 1), min_size=len(counts), max_size=len(counts))))
    sizes = proportional_sizes(shares, counts, keep, multiple)
    assert all(multiple <= size <= count and size % multiple == 0 for size, count in zip(sizes, counts, strict=True))
    assert sum(sizes) == keep or min(sizes) == multiple
