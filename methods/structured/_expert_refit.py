"""The last layers of the experts that stay take over for those that are gone: least squares, one expert at a time."""

from __future__ import annotations

from methods._torch import torch
from methods.structured._refit import least_squares


def gated_rows(inner: torch.Tensor, gates: torch.Tensor, *, constant: bool) -> torch.Tensor:
    """(tokens, in) of g_t a_t, with a column of g_t for the bias if `constant`: inputs of the last layer.

    `inner` (tokens, in) is what an expert has before its last layer, `gates` (tokens,) what its outputs are multiplied
    by.
    """
    inner = torch.cat([inner, inner.new_ones(len(inner), 1)], 1) if constant else inner
    return inner * gates[:, None].to(inner.dtype)


def refit_down(
    weight: torch.Tensor, gram: torch.Tensor, target: torch.Tensor, damping: float
) -> tuple[torch.Tensor, float]:
    """The (out, in) that minimises sum_t ||W g_t a_t - r_t||^2 + damping ||(W - W_0) D||^2, and the damping used.

    r_t is what the mixture lacks without this expert; `gram` (in, in) and `target` (out, in) are the sums of x x^T and
    r x^T, x = g_t a_t, D^2 the Gram matrix's diagonal. Raises ValueError where no damping makes the system solvable.
    """
    return least_squares(weight, gram, target, torch.arange(weight.shape[1], device=weight.device), damping)
