"""What is left takes over: new values for the kept input columns of a linear layer whose other inputs are gone."""

from __future__ import annotations

from methods._gram import damped
from methods._torch import torch


def least_squares(
    weight: torch.Tensor, gram: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, damping: float
) -> tuple[torch.Tensor, float]:
    """The (out, kept) that minimise ||T - X_K W_new^T||^2 + damping ||(W_new - W_K) D||^2, and the damping used.

    `weight` (out, in) is the dense W, `gram` = X^T X (in, in) of the inputs, `target` = T^T X (out, in) of the outputs
    to reach (`methods._gram.dense_target`), `kept` the columns, D^2 the Gram matrix's diagonal. Without damping that is
    T^T X_K G_KK^-1; an input that is always 0 gets 0. Raises ValueError where no damping makes the system solvable.
    """
    scale = gram.diagonal()[kept].sqrt()
    scale = scale.masked_fill(scale == 0, 1.0)
    scaled = gram[kept][:, kept] / scale / scale[:, None]
    scaled.fill_diagonal_(1.0)
    dense = weight[:, kept] * scale
    factor, used = damped(scaled, damping, torch.linalg.cholesky)
    solved = torch.cholesky_solve((target[:, kept] / scale + used * dense).T, factor).T
    return solved / scale, used


def bias_of_removed(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """FLAP's compensation (arXiv:2312.11983): W_:,j mean(x_j), summed over the inputs j that go; (out,)."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    return weight[:, gone] @ mean[gone]
