"""Parts that the solvers share: a damped Gram matrix, and the target that the pruned linear layer should reproduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from methods._pattern import zeroed
from methods._torch import torch

_MOST_RAISES = 8


def alpha_option() -> Any:
    """The field of the options of whatever follows targets."""
    meaning = "with --target dense: how far to follow the dense model"
    return field(default=0.75, metadata={"help": meaning, "least": 0, "most": 1})


def dense_target(weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], alpha: float) -> torch.Tensor:
    """(1 - alpha) W G + alpha T^T X' (out, in): the right-hand side whose solution on all inputs is the target.

    G = X'^T X' of the layer's inputs, T the outputs that the dense model wants of it. T^T X' is `output_cross`, where a
    layer also makes up for what the residual stream has lost; else W C, C = X^T X' with the dense model's inputs X
    (`cross`); with neither, the target is W G.
    """
    if "output_cross" in statistics:
        return torch.lerp(weight @ statistics["gram"], statistics["output_cross"], alpha)
    if "cross" in statistics:
        return weight @ torch.lerp(statistics["gram"], statistics["cross"], alpha)
    return weight @ statistics["gram"]


def follows_dense(statistics: Mapping[str, torch.Tensor]) -> bool:
    """Whether `dense_target` is another one than the layer's own outputs."""
    return "output_cross" in statistics or "cross" in statistics


def raised_damping(asked: float, used: float) -> tuple[str, ...]:
    """The note for the report, if `damped` had to raise it."""
    return () if used == asked else (f"damping raised from {asked:g} to {used:g}",)


def damped(
    gram: torch.Tensor, damping: float, factor: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """`factor(gram + damping * mean diagonal * I)`, the damping raised tenfold until it succeeds; and that damping.

    Raises ValueError when no reasonable damping makes the matrix positive definite.
    """
    mean = float(gram.diagonal().mean())
    for raised in range(_MOST_RAISES):
        tried = damping * 10**raised
        matrix = gram.clone()
        matrix.diagonal().add_(tried * mean)
        try:
            result = factor(matrix)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            continue
        if bool(torch.isfinite(result).all()):
            return result, tried
    raise ValueError("the Gram matrix of its inputs stays singular however much it is damped: use other text or wanda")


def conjugate_gradients(
    matrix: torch.Tensor, target: torch.Tensor, start: torch.Tensor, keep: torch.Tensor, steps: int
) -> torch.Tensor:
    """Rows x with x A = target on the kept places and 0 elsewhere; a row that is solved stays as it is."""
    # Rows around 1 (powers of two lose nothing): squares of tiny residuals would leave float32's range.
    unit = torch.ldexp(
        torch.ones(len(target), 1, device=target.device), torch.frexp(target.abs().amax(1, keepdim=True))[1]
    )
    target = target / unit
    solution = zeroed(start / unit, keep)
    residual = zeroed(target - solution @ matrix, keep)
    direction = residual.clone()
    square = residual.square().sum(1, keepdim=True)
    tiny = torch.finfo(square.dtype).tiny
    for _ in range(steps):
        product = zeroed(direction @ matrix, keep)
        curvature = (direction * product).sum(1, keepdim=True)
        length = square / curvature.clamp_min(tiny)
        length = length.masked_fill(curvature <= tiny, 0.0)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        after = residual.square().sum(1, keepdim=True)
        direction.mul_(after / square.clamp_min(tiny)).add_(residual)
        square = after
    return solution * unit
