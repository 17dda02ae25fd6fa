"""How many units every block keeps, where blocks may differ: exact budgets, whatever the rule that spreads them."""

from __future__ import annotations

from collections.abc import Sequence

from methods._torch import torch


def coarse_shares(importance: torch.Tensor) -> torch.Tensor:
    """CFSP's coarse stage (arXiv:2409.13199): sigmoid of the blocks' importance, centred; (blocks,).

    The importance is the mean angle between a block's input and output. It is taken in units of its own standard
    deviation over the blocks, so that neither the number of tokens nor the size of the angles changes the shares.
    """
    centred = importance.double() - importance.double().mean()
    spread = centred.square().mean().sqrt()
    return torch.sigmoid(centred / spread) if spread > 0 else torch.full_like(centred, 0.5)


def proportional_sizes(shares: torch.Tensor, counts: Sequence[int], keep: int, multiple: int) -> list[int]:
    """Units to keep per block: proportional to `shares` times `counts`, at least `multiple`, at most all of them.

    They are multiples of `multiple` (a whole block may be any size) that sum up to `keep`, or as near as these allow.
    """
    total = torch.tensor(counts, dtype=torch.float64)
    wanted = _scaled(shares.double() * total, total, float(keep)).tolist()
    sizes = [_rounded_down(want, count, multiple) for want, count in zip(wanted, counts, strict=True)]
    while sum(sizes) + multiple <= keep:
        room = [block for block, count in enumerate(counts) if sizes[block] < count]
        if not room:
            break
        most = max(room, key=lambda block: wanted[block] - sizes[block])
        sizes[most] = min(counts[most], sizes[most] + multiple)
    return sizes


def _rounded_down(want: float, count: int, multiple: int) -> int:
    return min(count, max(multiple, int(want + 1e-9) // multiple * multiple))


def _scaled(wanted: torch.Tensor, most: torch.Tensor, total: float) -> torch.Tensor:
    """`wanted` times a factor, capped at `most`, so that the sum is `total`."""
    free = torch.ones_like(wanted, dtype=torch.bool)
    result = most.clone()
    while bool(free.any()):
        factor = (total - float(most[~free].sum())) / float(wanted[free].sum())
        result = torch.where(free, wanted * factor, most)
        over = free & (result > most)
        if not bool(over.any()):
            return result
        free &= ~over
    return most
