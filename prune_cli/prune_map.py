"""The border between checkpoint and method: a stored tensor becomes (out, in) float32 and comes back as stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from methods._pattern import Pattern
from prune_cli.errors import PruneError
from prune_cli.model import Place
from prune_cli.pipeline import Pipeline
from prune_cli.plan import matrix_shape


@dataclass(frozen=True)
class Settings:
    """What is the same for every map of a run; `patterns` has one entry for each."""

    pipeline: Pipeline
    patterns: Mapping[str, Pattern]
    seed: int
    device: torch.device


@dataclass(frozen=True)
class PrunedMap:
    """`stored`: the checkpoint's dtype and orientation; `output_error`: ||X(W-W')^T||^2 / ||XW^T||^2 if measured."""

    stored: torch.Tensor
    output_error: float | None
    notes: tuple[str, ...] = ()


def prune_map(
    place: Place,
    stored: torch.Tensor,
    settings: Settings,
    statistics: Mapping[str, torch.Tensor],
    rows: torch.Tensor | None,
) -> PrunedMap:
    """Prune one tensor. `rows` (rows, in) stand for its inputs in the error. Raises PruneError naming the tensor."""
    name = place.entry.name
    for statistic, value in statistics.items():
        if not bool(torch.isfinite(value).all()):
            raise PruneError(
                f"The inputs of {name} are not finite ({statistic}): the forward pass overflows; try --dtype float32."
            )
    weight = as_matrix(place, stored).to(settings.device, torch.float32)
    generator = torch.Generator().manual_seed(_seed_of(name, settings.seed))
    pipeline, pattern = settings.pipeline, settings.patterns[name]
    try:
        result = pipeline.method.prune(weight, statistics, pattern, pipeline.options, generator)
        for following in pipeline.steps:
            result = following.step.improve(weight, result, statistics, pattern, following.options)
    except ValueError as error:
        raise PruneError(f"{name} cannot be pruned: {error}") from error
    measured = None if rows is None else _output_error(rows, weight, result.weight)
    return PrunedMap(as_stored(place, result.weight, stored.dtype), measured, result.notes)


def as_matrix(place: Place, stored: torch.Tensor) -> torch.Tensor:
    """(out, in) view: GPT-2's Conv1D is stored (in, out), a vector is one row."""
    return stored.T if place.transposed else stored.reshape(matrix_shape(place))


def as_stored(place: Place, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    oriented = matrix.T if place.transposed else matrix
    return oriented.to(dtype).reshape(place.entry.shape).contiguous()


def _output_error(rows: torch.Tensor, weight: torch.Tensor, new: torch.Tensor) -> float:
    lost = torch.linalg.vector_norm(rows @ (weight - new).T).square()
    whole = torch.linalg.vector_norm(rows @ weight.T).square()
    return float(lost / whole) if whole > 0 else 0.0


def _seed_of(name: str, seed: int) -> int:
    """One stream of random numbers per tensor, whatever the order of the tensors."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
