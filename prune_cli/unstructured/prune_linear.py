"""The border between checkpoint and method: a stored tensor becomes (out, in) float32 and comes back as stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from calibration.statistics import sum_dtype
from methods._pattern import Pattern
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.seeds import seed_of
from prune_cli.errors import PruneError
from prune_cli.model.orientation import as_matrix, as_stored, matrices
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.request.pipeline import Pipeline

_ON_HOST = "solved on the host: the Gram matrices of its inputs do not fit the device"
# Weights up to 2 to this power, either way, are left as they are.
_ORDINARY = 32
_HIGHEST_POWER = 127  # of two, in float32


@dataclass(frozen=True)
class Settings:
    """What is the same for every linear layer of a run; `patterns` has one entry for each."""

    pipeline: Pipeline
    patterns: Mapping[str, Pattern]
    seed: int
    device: torch.device
    # Calibration tokens, by which errors are measured on all rows or on a sketch of them.
    tokens: int = 0
    # How the output holds new values; None where they stay in memory.
    output: Checkpoint | None = None
    # Of linear layers (out,), where their rows compete by what their errors matter.
    sensitivities: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # Whether the batches wait before a block, after it was pruned, to pass it again.
    again: bool = False


@dataclass(frozen=True)
class LinearInputs:
    """What is known of the inputs of one linear layer, or of `expert` where the tensor holds those of all.

    `rows` (rows, in) stand for the inputs in the error; None where no inputs are seen. `notes` go into the report.
    `owner` is the only rank that knows, where it is said.
    """

    info: TensorInfo
    expert: int = 0
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rows: torch.Tensor | None = None
    notes: tuple[str, ...] = ()
    owner: int | None = None

    @property
    def name(self) -> str:
        """What the matrix is called in messages, and its random numbers are drawn by."""
        tensor = self.info.entry.name
        return tensor if self.info.slices == 1 else f"{tensor}[{self.expert}]"


@dataclass(frozen=True)
class PrunedLinear:
    """`stored`: as the output's file holds it; `error_sq` and `output_sq`: ||X(W-W')^T||^2 and ||XW^T||^2 if known.

    `zeros` are counted among its values.
    """

    stored: torch.Tensor
    zeros: int
    error_sq: float | None
    output_sq: float | None
    notes: tuple[str, ...] = ()

    @property
    def output_error(self) -> float | None:
        """The lost share of the outputs."""
        if self.error_sq is None or self.output_sq is None:
            return None
        return self.error_sq / self.output_sq if self.output_sq > 0 else 0.0


def prune_data_free(info: TensorInfo, stored: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, PrunedLinear]:
    """Prune one tensor by its weights alone, slice by slice if it holds all experts; returns as `prune_linear` does."""
    if info.slices == 1:
        return prune_linear(LinearInputs(info), stored, settings)
    slices = [prune_linear(LinearInputs(info, at), each, settings) for at, each in enumerate(matrices(info, stored))]
    return _joined(info, [values for values, _ in slices]), join_slices(info, [result for _, result in slices])


def join_slices(info: TensorInfo, slices: Sequence[PrunedLinear]) -> PrunedLinear:
    """The tensor that holds all experts, from the matrices of each."""
    error_sq, output_sq = [each.error_sq for each in slices], [each.output_sq for each in slices]
    return PrunedLinear(
        _joined(info, [each.stored for each in slices]),
        sum(each.zeros for each in slices),
        None if None in error_sq else sum(filter(None, error_sq)),
        None if None in output_sq else sum(filter(None, output_sq)),
        tuple(f"expert {at}: {note}" for at, each in enumerate(slices) for note in each.notes),
    )


def _joined(info: TensorInfo, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts)) if info.expert is not None and info.expert.rows else torch.stack(list(parts))


def prune_linear(inputs: LinearInputs, stored: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, PrunedLinear]:
    """Prune one matrix, `stored` in the checkpoint's dtype and orientation. Raises PruneError naming the tensor.

    Returns the new values in the same, which the model computes with, and what is kept until the block is written.
    """
    info, name = inputs.info, inputs.name
    statistics, rows, device, on_host = _on_one_device(inputs, settings.device)
    weight = as_matrix(info, stored).to(device, torch.float32)
    scale = _power_to_ordinary(weight)
    if scale != 1:
        weight = weight * scale
        statistics = {key: value * scale if key == "output_cross" else value for key, value in statistics.items()}
    if info.entry.name in settings.sensitivities:
        statistics = {**statistics, "sensitivity": settings.sensitivities[info.entry.name].to(device)}
    generator = torch.Generator().manual_seed(seed_of(name, settings.seed))
    pipeline, pattern = settings.pipeline, settings.patterns[info.entry.name]
    try:
        result = pipeline.method.prune(weight, statistics, pattern, pipeline.options, generator)
        for following in pipeline.steps:
            result = following.step.improve(weight, result, statistics, pattern, following.options)
    except ValueError as error:
        raise PruneError(f"{name} cannot be pruned: {error}") from error
    unscaled = result.weight if scale == 1 else result.weight / scale
    wanted = as_stored(info, name, unscaled, stored)
    new, in_file = _rounded(inputs, wanted, settings)
    given = result.weight if new is wanted else as_matrix(info, new).to(device, torch.float32) * scale
    error_sq, output_sq = (None, None) if rows is None else squares(rows, weight, given)
    notes = (*result.notes, *on_host, *_requantised(wanted, new), *inputs.notes)
    return new, PrunedLinear(in_file, new.numel() - int(new.count_nonzero()), error_sq, output_sq, notes)


def _on_one_device(
    inputs: LinearInputs, device: torch.device
) -> tuple[Mapping[str, torch.Tensor], torch.Tensor | None, torch.device, tuple[str, ...]]:
    """Statistics, rows, the device where their Gram matrices fit, and a note where that is the host."""
    statistics, rows = inputs.statistics, inputs.rows
    for statistic, value in statistics.items():
        if not bool(torch.isfinite(value).all()):
            raise PruneError(
                f"The inputs of {inputs.name} are not finite ({statistic}): the forward pass overflows; try --dtype "
                "float32."
            )
    if "gram" not in statistics or statistics["gram"].device.type == device.type:
        return statistics, rows, device, ()
    host = statistics["gram"].device
    moved = {statistic: value.to(host) for statistic, value in statistics.items()}
    return moved, None if rows is None else rows.to(host), host, (_ON_HOST,)


def _rounded(inputs: LinearInputs, wanted: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """`wanted` as the output can hold it, the same object where that is just so; and what its file holds for it."""
    if settings.output is None:
        return wanted, wanted
    name, expert = inputs.info.entry.name, inputs.expert if inputs.info.slices > 1 else None
    on_host = wanted.cpu()
    in_file = settings.output.to_file(name, on_host, expert)
    if in_file is on_host:
        return wanted, in_file
    new = settings.output.from_file(name, in_file, expert).to(wanted.device, wanted.dtype)
    return (wanted if torch.equal(new, wanted) else new), in_file


def _requantised(wanted: torch.Tensor, new: torch.Tensor) -> tuple[str, ...]:
    """What it costs to keep the scales of a packed input; a mask costs nothing."""
    if new is wanted:
        return ()
    error = float((new.float() - wanted.float()).norm() / wanted.float().norm())
    return (f"new values on the scales of the input: a relative error of {error:.3g} is added",)


def _power_to_ordinary(weight: torch.Tensor) -> float:
    """A power of two that brings weights whose products would leave float32's range to around 1; else 1."""
    largest = float(weight.abs().amax()) if weight.numel() else 0.0
    if largest == 0 or not math.isfinite(largest) or 2.0**-_ORDINARY < largest < 2.0**_ORDINARY:
        return 1.0
    return 2.0 ** min(-math.frexp(largest)[1], _HIGHEST_POWER)


def squares(rows: torch.Tensor, weight: torch.Tensor, new: torch.Tensor) -> tuple[float, float]:
    """||X(W-W')^T||^2 and ||XW^T||^2 for inputs X (rows, in)."""
    error_sq = torch.linalg.vector_norm(rows @ (weight - new).T, dtype=sum_dtype(rows.device))
    output_sq = torch.linalg.vector_norm(rows @ weight.T, dtype=sum_dtype(rows.device))
    return float(error_sq) ** 2, float(output_sq) ** 2
