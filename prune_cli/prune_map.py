"""The border between checkpoint and method: a stored tensor becomes (out, in) float32 and comes back as stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from calibration.statistics import sum_dtype
from methods._pattern import Pattern
from prune_cli.errors import PruneError
from prune_cli.pipeline import Pipeline
from prune_cli.places import Place
from prune_cli.plan import matrix_shape

_ON_HOST = "solved on the host: the Gram matrices of its inputs do not fit the device"
# Weights up to 2 to this power, either way, are left as they are.
_ORDINARY = 32
_HIGHEST_POWER = 127  # of two, in float32


@dataclass(frozen=True)
class Settings:
    """What is the same for every map of a run; `patterns` has one entry for each."""

    pipeline: Pipeline
    patterns: Mapping[str, Pattern]
    seed: int
    device: torch.device
    # Values of a tensor, or of one of its experts, as the output will give them back.
    rounded: Callable[[str, torch.Tensor, int | None], torch.Tensor] | None = None


@dataclass(frozen=True)
class PrunedMap:
    """`stored`: the checkpoint's dtype and orientation; `lost` and `whole`: ||X(W-W')^T||^2 and ||XW^T||^2 if known."""

    stored: torch.Tensor
    lost: float | None
    whole: float | None
    notes: tuple[str, ...] = ()

    @property
    def output_error(self) -> float | None:
        """The lost share of the outputs."""
        if self.lost is None or self.whole is None:
            return None
        return self.lost / self.whole if self.whole > 0 else 0.0


def prune_map(
    place: Place,
    stored: torch.Tensor,
    settings: Settings,
    statistics: Mapping[str, torch.Tensor],
    rows: torch.Tensor | None,
) -> PrunedMap:
    """Prune one tensor, slice by slice if it holds all experts, by what is known of its inputs (nothing, of experts).

    `rows` (rows, in) stand for the inputs in the error. Raises PruneError naming the tensor.
    """
    if place.slices == 1:
        return prune_slice(place, 0, stored, settings, statistics, rows)
    return join_slices([prune_slice(place, at, each, settings, {}, None) for at, each in enumerate(stored)])


def slice_name(place: Place, expert: int) -> str:
    """What the matrix of `expert` is called in messages, and its random numbers are drawn by."""
    return place.entry.name if place.slices == 1 else f"{place.entry.name}[{expert}]"


def join_slices(slices: Sequence[PrunedMap]) -> PrunedMap:
    """The tensor that holds all experts, from the matrices of each."""
    lost, whole = [each.lost for each in slices], [each.whole for each in slices]
    return PrunedMap(
        torch.stack([each.stored for each in slices]),
        None if None in lost else sum(filter(None, lost)),
        None if None in whole else sum(filter(None, whole)),
        tuple(f"expert {at}: {note}" for at, each in enumerate(slices) for note in each.notes),
    )


def prune_slice(
    place: Place,
    expert: int,
    stored: torch.Tensor,
    settings: Settings,
    statistics: Mapping[str, torch.Tensor],
    rows: torch.Tensor | None,
) -> PrunedMap:
    """Prune one matrix, `stored` like those of the tensor at `place`; the rest as for `prune_map`."""
    name = slice_name(place, expert)
    for statistic, value in statistics.items():
        if not bool(torch.isfinite(value).all()):
            raise PruneError(
                f"The inputs of {name} are not finite ({statistic}): the forward pass overflows; try --dtype float32."
            )
    device, on_host = settings.device, ()
    if "gram" in statistics and statistics["gram"].device.type != device.type:
        device, on_host = statistics["gram"].device, (_ON_HOST,)
        statistics = {statistic: value.to(device) for statistic, value in statistics.items()}
        rows = None if rows is None else rows.to(device)
    weight = as_matrix(place, stored).to(device, torch.float32)
    scale = _power_to_ordinary(weight)
    if scale != 1:
        weight = weight * scale
        statistics = {key: value * scale if key == "drift" else value for key, value in statistics.items()}
    generator = torch.Generator().manual_seed(seed_of(name, settings.seed))
    pipeline, pattern = settings.pipeline, settings.patterns[place.entry.name]
    try:
        result = pipeline.method.prune(weight, statistics, pattern, pipeline.options, generator)
        for following in pipeline.steps:
            result = following.step.improve(weight, result, statistics, pattern, following.options)
    except ValueError as error:
        raise PruneError(f"{name} cannot be pruned: {error}") from error
    unscaled = result.weight if scale == 1 else result.weight / scale
    wanted = _as_stored(place, unscaled, stored)
    new = _rounded(place, expert, wanted, settings)
    given = result.weight if new is wanted else as_matrix(place, new).to(device, torch.float32) * scale
    lost, whole = (None, None) if rows is None else _squares(rows, weight, given)
    return PrunedMap(new, lost, whole, (*result.notes, *on_host, *_requantised(wanted, new)))


def _rounded(place: Place, expert: int, wanted: torch.Tensor, settings: Settings) -> torch.Tensor:
    """`wanted` as the output can hold it; the same object where that is just so."""
    if settings.rounded is None:
        return wanted
    new = settings.rounded(place.entry.name, wanted, expert if place.slices > 1 else None)
    return wanted if torch.equal(new, wanted) else new


def _requantised(wanted: torch.Tensor, new: torch.Tensor) -> tuple[str, ...]:
    """What it costs to keep the scales of a packed input; a mask costs nothing."""
    if new is wanted:
        return ()
    error = float((new.float() - wanted.float()).norm() / wanted.float().norm())
    return (f"new values on the scales of the input: a relative error of {error:.3g} is added",)


def as_matrix(place: Place, stored: torch.Tensor) -> torch.Tensor:
    """(out, in) view of a tensor or slice: GPT-2's Conv1D is stored (in, out), a vector is one row."""
    return stored.T if place.transposed else stored.reshape(matrix_shape(place))


def _as_stored(place: Place, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    oriented = matrix.T if place.transposed else matrix
    return oriented.to(like.dtype).reshape(like.shape).contiguous()


def _power_to_ordinary(weight: torch.Tensor) -> float:
    """A power of two that brings weights whose products would leave float32's range to around 1; else 1."""
    largest = float(weight.abs().amax()) if weight.numel() else 0.0
    if largest == 0 or not math.isfinite(largest) or 2.0**-_ORDINARY < largest < 2.0**_ORDINARY:
        return 1.0
    return 2.0 ** min(-math.frexp(largest)[1], _HIGHEST_POWER)


def _squares(rows: torch.Tensor, weight: torch.Tensor, new: torch.Tensor) -> tuple[float, float]:
    lost = torch.linalg.vector_norm(rows @ (weight - new).T, dtype=sum_dtype(rows.device))
    whole = torch.linalg.vector_norm(rows @ weight.T, dtype=sum_dtype(rows.device))
    return float(lost) ** 2, float(whole) ** 2


def seed_of(name: str, seed: int) -> int:
    """One stream of random numbers per tensor, whatever the order of the tensors."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
