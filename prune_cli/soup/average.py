"""The arithmetic of a soup, on one tensor of every model at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prune_cli.checkpoint.stored_values import sum_dtype, to_stored
from prune_cli.soup.request import Masks

# A few zeros come about by chance; from this share on they are taken for a mask.
SPARSE_SHARE = 0.01


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same to the last bit; unlike ==, NaN equals itself and -0.0 is not 0.0."""
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def is_sparse(tensor: torch.Tensor) -> bool:
    """Whether a matrix (or a stack of them) has so many zeros that it must have been pruned."""
    if tensor.ndim < 2 or not tensor.numel():
        return False
    return tensor.numel() - int(tensor.count_nonzero()) > SPARSE_SHARE * tensor.numel()


def average(
    name: str, read: Sequence[Callable[[], torch.Tensor]], weights: Sequence[float], masks: Masks, *, sparse: bool
) -> torch.Tensor:
    """The weighted mean of the tensors `name` that `read` returns one by one, in their dtype; zeros are +0.0.

    Summed in float32 (float64 for float64), in the order given. With `intersection` a `sparse` tensor keeps only
    what is zero in none of them; what only some keep is averaged with the zeros of the others. Raises PruneError where
    the mean is not finite.
    """
    total, keep, dtype = None, None, torch.float32
    for tensor, weight in zip((each() for each in read), weights, strict=True):
        wide = sum_dtype(tensor.dtype)
        if total is None:
            total, dtype = torch.zeros(tensor.shape, dtype=wide), tensor.dtype
        total.add_(tensor.to(wide), alpha=weight)
        if sparse and masks == "intersection":
            keep = tensor != 0 if keep is None else keep.logical_and_(tensor != 0)
    assert total is not None
    if keep is not None:
        total.masked_fill_(~keep, 0)
    result = to_stored(name, total, dtype)
    return result.masked_fill_(result == 0, 0)  # -0.0 becomes +0.0
