"""Scales of tiles: what a stored one is worth, and which one a weight has."""

from __future__ import annotations

import torch

from prune_cli.errors import RequestError

# E8M0: a byte that is the exponent of two, plus 127; safetensors of before 0.6 have no name of their own for it.
E8M0 = frozenset({"F8_E8M0", "U8"})
_BIAS, _NOT_A_NUMBER = 127, 255


def scale_values(stored: torch.Tensor, name: str) -> torch.Tensor:
    """E8M0 scales in float32, others as they are. Raises RequestError, naming them, for NaN and Inf."""
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = stored.view(torch.uint8)
        if bool((exponents == _NOT_A_NUMBER).any()):
            raise RequestError(f"{name} holds E8M0 scales of 255, which stand for NaN: download the checkpoint again.")
        return torch.exp2(exponents.double() - _BIAS).float()
    if not bool(torch.isfinite(stored).all()):
        raise RequestError(f"{name} holds scales that are NaN or infinite: download the checkpoint again.")
    return stored


def grid_shape(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, ...]:
    """How many tiles of `tile` (rows, columns) cover a weight of `shape` (..., rows, columns); edge tiles are cut."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // tile[0]), -(-columns // tile[1]))


def spread(grid: torch.Tensor, tile: tuple[int, int], rows: range, columns: int) -> torch.Tensor:
    """What `grid` (tiles down, tiles across) has for each weight of some `rows`, or one column if all share it."""
    if grid.shape[0] > 1:
        grid = grid[torch.arange(rows.start, rows.stop) // tile[0]]
    return grid if grid.shape[1] == 1 else grid.repeat_interleave(tile[1], dim=1)[:, :columns]
