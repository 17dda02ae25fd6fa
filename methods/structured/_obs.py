"""Optimal Brain Surgeon for whole units: remove what the others can make up for, a few at a time."""

from __future__ import annotations

from methods._gram import damped
from methods._torch import torch


def eliminate(
    gram: torch.Tensor, target: torch.Tensor, width: int, count: int, keep: int, damping: float, chunk: int
) -> torch.Tensor:
    """The `keep` units (of `count`, `width` inputs each) whose least squares fit to `target` is best, found greedily.

    `gram` (in, in) of the inputs, `target` (out, in) the right-hand side T^T X; inputs beyond count * width always stay
    (a bias's constant). Removing unit u raises the squared error by exactly tr(W_u (G^-1_uu)^-1 W_u^T), W = aim G^-1;
    the `chunk` cheapest go at once, then W and G^-1 are those of the rest. Returns (keep,) indices in order.
    """
    inverse, _ = damped(gram, damping, lambda matrix: torch.cholesky_inverse(torch.linalg.cholesky(matrix)))
    weight = target @ inverse
    left = torch.arange(count, device=gram.device)
    while len(left) > keep:
        errors = unit_errors(inverse, weight, width, len(left))
        going = errors.sort(stable=True).indices[: min(chunk, len(left) - keep)].sort().values
        stays = torch.ones(len(inverse), dtype=torch.bool, device=gram.device)
        out = (going[:, None] * width + torch.arange(width, device=gram.device)).flatten()
        stays[out] = False
        solved = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stays])
        weight = weight[:, stays] - weight[:, out] @ solved
        inverse = inverse[stays][:, stays] - inverse[stays][:, out] @ solved
        remain = torch.ones(len(left), dtype=torch.bool, device=gram.device)
        remain[going] = False
        left = left[remain]
    return left


def unit_errors(inverse: torch.Tensor, weight: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """tr(W_u (G^-1_uu)^-1 W_u^T) of every unit (count,): the squared error that its removal adds after a refit."""
    if width == 1:
        return weight[:, :count].square().sum(0) / inverse.diagonal()[:count]
    errors = []
    for unit in range(count):
        at = slice(unit * width, (unit + 1) * width)
        part = weight[:, at]
        errors.append((part * torch.linalg.solve(inverse[at, at], part, left=False)).sum())
    return torch.stack(errors)
