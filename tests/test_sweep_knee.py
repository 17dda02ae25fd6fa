"""The knee on curves whose knee is known, with and without noise, and on curves that have none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.sweeps.knee import LEAST_POINTS, find_knee

GRID = [step / 10 for step in range(10)]
KNEES, FLAT, STEEP = st.floats(0.15, 0.75), st.floats(0, 0.5), st.floats(2, 12)


def bent(knee: float, before: float, after: float) -> list[float]:
    """A curve of two straight segments on GRID, from 0."""
    return [before * x + (after - before) * max(x - knee, 0) for x in GRID]


def without_windows(curve: list[float]) -> list[list[float]]:
    return [[value] for value in curve]


def with_noise(curve: list[float], seed: int, *, share: float) -> np.ndarray:
    """40 windows a point: noise of the point, a `share` of the curve's height, and of the windows, paired."""
    generator = np.random.default_rng(seed)
    of_points = generator.normal(0, share * max(curve), (len(curve), 1))
    return np.array(curve)[:, None] + of_points + generator.normal(0, 0.3, (1, 40))


@settings(deadline=None, max_examples=12)
@given(KNEES, FLAT, STEEP)
def test_a_known_knee_is_found_and_lies_in_its_interval(knee: float, before: float, after: float) -> None:
    found = find_knee(GRID, without_windows(bent(knee, before, after)))
    assert found.sparsity is not None, found.reason
    assert found.low is not None
    assert found.high is not None
    assert found.sparsity == pytest.approx(knee, abs=0.05)
    assert found.low <= knee <= found.high
    assert found.slope_before == pytest.approx(before, abs=0.1 * after)
    assert found.slope_after == pytest.approx(after, rel=0.1)


@settings(deadline=None, max_examples=12)
@given(st.floats(0.25, 0.65), FLAT, STEEP, st.integers(0, 10**6))
def test_with_noise_it_is_found_within_one_step(knee: float, before: float, after: float, seed: int) -> None:
    found = find_knee(GRID, with_noise(bent(knee, before, after), seed, share=0.015).tolist())
    assert found.sparsity is not None, found.reason
    assert found.low is not None
    assert found.high is not None
    assert abs(found.sparsity - knee) <= 0.1
    assert found.low <= found.sparsity <= found.high


def test_the_interval_covers_the_knee_nearly_always() -> None:
    covered = 0
    for seed in range(100, 116):  # of 240 seeds 232 intervals cover, as 95 % ask
        knee = 0.25 + (seed - 100) / 40
        found = find_knee(GRID, with_noise(bent(knee, 0.2, 6.0), seed, share=0.02).tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= knee <= found.high
    assert covered >= 14


def test_the_interval_grows_with_the_noise_of_the_windows() -> None:
    generator = np.random.default_rng(0)
    curve = np.array(bent(0.55, 0.2, 6.0))[:, None]
    widths = []
    for noise in (0.01, 1.0):
        found = find_knee(GRID, (curve + generator.normal(0, noise, (10, 30))).tolist())
        assert found.low is not None
        assert found.high is not None
        widths.append(found.high - found.low)
    assert widths[1] > 2 * widths[0]


def test_what_grows_more_and_more_has_its_knee_where_two_lines_fit_best() -> None:
    found = find_knee(GRID, without_windows([math.exp(6 * x) / 100 for x in GRID]))
    assert found.sparsity == pytest.approx(_naive_breakpoint([math.exp(6 * x) / 100 for x in GRID]), abs=0.005)


def _naive_breakpoint(curve: list[float]) -> float:
    """Every breakpoint of a fine grid, one least-squares fit each."""
    x, y = np.array(GRID), np.array(curve)
    best = {}
    for k in np.arange(0.1, 0.8, 0.001):
        design = np.stack([np.ones(10), x, np.where(x > k, x - k, 0)], 1)
        best[float(k)] = float(np.square(y - design @ np.linalg.lstsq(design, y, rcond=None)[0]).sum())
    return min(best, key=best.__getitem__)


@pytest.mark.parametrize(
    ("curve", "why"),
    [
        ([0.0] * 10, "does not grow"),
        ([2 * x for x in GRID], "one straight line"),
        ([math.sqrt(x) for x in GRID], "straight line fits as well"),
        ([x + 0.7 * max(x - 0.5, 0) for x in GRID], "2 times as steep"),
    ],
)
def test_a_curve_without_a_knee_has_none(curve: list[float], why: str) -> None:
    found = find_knee(GRID, without_windows(curve))
    assert found.sparsity is None
    assert found.low is None
    assert why in (found.reason or "")


def test_noise_alone_is_hardly_ever_a_knee() -> None:
    generator = np.random.default_rng(0)
    lines = [(0.3 * np.array(GRID) + generator.normal(0, 0.05, 10))[:, None] for _ in range(40)]
    assert sum(find_knee(GRID, line.tolist()).sparsity is not None for line in lines) <= 2


def test_too_few_points_are_said_to_be_too_few() -> None:
    found = find_knee(GRID[: LEAST_POINTS - 1], without_windows([0, 0, 0, 1]))
    assert found.sparsity is None
    assert "too few" in (found.reason or "")
