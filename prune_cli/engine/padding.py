"""Padding counts nowhere: which rows of a layer's inputs are those of real tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.batch import Batch
from prune_cli.errors import PruneError


def real_rows(tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(tokens, in): the inputs (..., in) of a linear layer while `batch` passes it, without those of padding.

    Raises PruneError where the rows of `tensor` cannot be told apart by token.
    """
    if batch.mask is None:
        return tensor.reshape(-1, tensor.shape[-1])
    if tensor.ndim > 2 and tensor.shape[:2] == batch.mask.shape:
        flat = tensor.flatten(0, 1)
    elif tensor.ndim > 1 and tensor.shape[0] == batch.mask.numel():
        flat = tensor
    else:
        raise PruneError(
            f"This architecture passes a linear layer inputs of shape {list(tensor.shape)} for {len(batch)} samples of "
            f"{batch.length} tokens, in which padding cannot be told: use text without padding."
        )
    # Numbers, for a mask on the device would have the host wait for their count.
    real = batch.mask.flatten().nonzero().flatten().to(tensor.device)
    return flat[real].reshape(-1, tensor.shape[-1])


def rows_of_samples(rows: torch.Tensor, tensor: torch.Tensor, batch: Batch | None) -> Sequence[torch.Tensor]:
    """`rows`, as `real_rows` made them of `tensor`, one piece a sample."""
    if batch is None or batch.mask is None:
        return rows.split(tensor.shape[-2])
    of_a_token = len(rows) // batch.tokens
    return rows.split([length * of_a_token for length in batch.lengths])
