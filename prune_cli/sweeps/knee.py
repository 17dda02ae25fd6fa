"""The essential-sparsity knee of a curve: the sparsity beyond which the loss grows much faster.

The idea is of Jaiswal et al., "The Emergence of Essential Sparsity in Large Pre-trained Models" (NeurIPS 2023), who see
the knee by eye. Here it is the breakpoint of a continuous line of two segments, fitted by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DEFINITION = (
    "knee = the breakpoint of a continuous line of two segments, fitted by least squares to the loss increase over the "
    "asked sparsity; told only where the second segment is at least twice as steep as the first and one straight line "
    "is refuted (p < 0.01, residuals resampled); interval = where the fit's sum of squares stays below its 95 % limit "
    "(F test), widened to the 95 % of a bootstrap that resamples the evaluation windows, the same for all points"
)
LEAST_POINTS = 5
_LEAST_RATIO = 2.0
_P_VALUE = 0.01
_POSITIONS = 200
_REPLICATES = 500
_SEED = 0
_PARAMETERS = 4  # offset, two slopes, breakpoint
# Of the height of the curve: a sum of squares below its square is rounding.
_ROUNDING = 1e-9

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Knee:
    """`sparsity` with its 95 % interval and the slopes in nats per unit of sparsity; None with a `reason` if none."""

    sparsity: float | None
    low: float | None
    high: float | None
    slope_before: float | None
    slope_after: float | None
    p_value: float | None
    reason: str | None


def find_knee(sparsities: Sequence[float], increases: Sequence[Sequence[float]]) -> Knee:
    """The knee of a curve with the loss increases `increases[point][window]` in nats at ascending `sparsities`.

    A curve that is known without windows has one per point. The same input gives the same knee.
    """
    x, windows = np.asarray(sparsities, float), np.asarray(increases, float)
    if len(x) < LEAST_POINTS:
        return _none(f"{len(x)} points are too few: at least {LEAST_POINTS} are needed")
    y = windows.mean(1)
    height = float(np.abs(y).max())
    if height == 0:
        return _none("the loss does not grow")
    fits = _TwoSegments(x)
    at, bent = fits.best(y[None])
    _, straight = _straight(x, y)
    negligible = (_ROUNDING * height) ** 2 * len(x)
    if straight <= negligible:
        return _none("the curve is one straight line")
    generator = np.random.default_rng(_SEED)
    p_value = _p_value(fits, x, y, straight / max(float(bent[0]), negligible), generator)
    if p_value >= _P_VALUE:
        return _none(f"one straight line fits as well (p = {p_value:.2g})", p_value)
    before, after = fits.slopes(y, int(at[0]))
    if after < _LEAST_RATIO * max(before, 0.0) or after <= 0:
        return _none(f"the second segment is not {_LEAST_RATIO:g} times as steep as the first", p_value)
    low, high = _interval(fits, windows, int(at[0]), generator)
    return Knee(float(fits.positions[at[0]]), low, high, before, after, p_value, None)


def _none(reason: str, p_value: float | None = None) -> Knee:
    return Knee(None, None, None, None, None, p_value, reason)


class _TwoSegments:
    """Least squares for every position of the breakpoint at once; only fits that bend upwards count."""

    def __init__(self, x: Array) -> None:
        self.positions = np.linspace(x[1], x[-2], _POSITIONS + 1)
        hinges = np.maximum(x[None] - self.positions[:, None], 0)
        line = [np.broadcast_to(column, hinges.shape) for column in (np.ones_like(x), x)]
        self._designs = np.stack([*line, hinges], 2)  # (positions, points, 3)
        self._inverses = np.linalg.pinv(self._designs)  # (positions, 3, points)

    def best(self, curves: Array) -> tuple[NDArray[np.intp], Array]:
        """Of each of `curves` (curves, points): the index of the best position, and the sum of squares left there."""
        coefficients = np.einsum("kpn,cn->ckp", self._inverses, curves)
        fitted = np.einsum("knp,ckp->ckn", self._designs, coefficients)
        left = np.square(curves[:, None] - fitted).sum(2)
        left[coefficients[:, :, 2] < 0] = np.inf
        at = left.argmin(1)
        return at, left[np.arange(len(curves)), at]

    def left(self, curve: Array) -> Array:
        """The sum of squares left for every position; infinite where the fit does not bend upwards."""
        coefficients = self._inverses @ curve
        left = np.square(curve - np.einsum("knp,kp->kn", self._designs, coefficients)).sum(1)
        return np.where(coefficients[:, 2] < 0, np.inf, left)

    def slopes(self, curve: Array, at: int) -> tuple[float, float]:
        _, before, bend = self._inverses[at] @ curve
        return float(before), float(before + bend)


def _straight(x: Array, y: Array) -> tuple[Array, float]:
    """The fitted line's values and the sum of squares that it leaves."""
    design = np.stack([np.ones_like(x), x], 1)
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return fitted, float(np.square(y - fitted).sum())


def _p_value(fits: _TwoSegments, x: Array, y: Array, gained: float, generator: np.random.Generator) -> float:
    """How often curves that are the straight line plus its own residuals, resampled, gain as much from a bend."""
    line, _ = _straight(x, y)
    residuals = generator.choice(y - line, (_REPLICATES, len(x)))
    curves = line + residuals
    design = np.stack([np.ones_like(x), x], 1)
    flat = curves - curves @ (design @ np.linalg.pinv(design)).T
    lost = np.square(flat).sum(1)
    left = np.minimum(fits.best(curves)[1], lost)
    gains = np.divide(lost, left, out=np.full(_REPLICATES, np.inf), where=left > 0)
    return float((1 + np.count_nonzero(gains >= gained)) / (1 + _REPLICATES))


def _interval(fits: _TwoSegments, windows: Array, at: int, generator: np.random.Generator) -> tuple[float, float]:
    """From where to where the knee may lie, for the noise of the windows and for the misfit of two segments."""
    points, count = windows.shape
    drawn = generator.integers(0, count, (_REPLICATES, count))
    shares = np.stack([np.bincount(row, minlength=count) for row in drawn]) / count
    of_windows = np.quantile(fits.positions[fits.best(shares @ windows.T)[0]], [0.025, 0.975])
    left = fits.left(windows.mean(1))
    freedom = points - _PARAMETERS
    likely = fits.positions[left <= left[at] * (1 + _two_sided_t(freedom) ** 2 / freedom)]
    step = float(fits.positions[1] - fits.positions[0])
    return float(min(of_windows[0], likely.min() - step)), float(max(of_windows[1], likely.max() + step))


def _two_sided_t(freedom: int) -> float:
    """What the size of Student's t stays below with 95 %: with t = sqrt(freedom) tan(a), a's density is a cosine's."""
    angles = np.linspace(0, np.pi / 2, 20001)[:-1]
    share = np.cumsum(np.cos(angles) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(angles[np.searchsorted(share, 0.95 * share[-1])]))
