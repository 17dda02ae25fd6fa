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
    mask = batch.mask.to(tensor.device)
    if tensor.ndim > 2 and tensor.shape[:2] == mask.shape:
        kept = tensor[mask]
    elif tensor.ndim > 1 and tensor.shape[0] == mask.numel():
        kept = tensor[mask.flatten()]
    else:
        raise PruneError(
            f"This architecture passes a linear layer inputs of shape {list(tensor.shape)} for {len(batch)} samples of "
            f"{batch.length} tokens, in which padding cannot be told: use text without padding."
        )
    return kept.reshape(-1, tensor.shape[-1])


def rows_of_samples(rows: torch.Tensor, tensor: torch.Tensor, batch: Batch | None) -> Sequence[torch.Tensor]:
    """`rows`, as `real_rows` made them of `tensor`, one piece a sample."""
    if batch is None or batch.mask is None:
        return rows.split(tensor.shape[-2])
    of_a_token = len(rows) // batch.tokens
    return rows.split([length * of_a_token for length in batch.lengths])
