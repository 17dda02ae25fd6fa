"""A stored tensor turned to (out, in) and back: GPT-2's Conv1D and the transposed experts are turned here alone."""

from __future__ import annotations

import torch

from prune_cli.checkpoint.stored_values import to_stored
from prune_cli.model.tensor_info import TensorInfo


def matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """(out, in) of the tensor, or of each of its slices, as a method sees it; a vector is one row."""
    shape, count = info.entry.shape, info.entry.count // info.slices
    if info.expert is not None:
        shape = (count // shape[-1], shape[-1])
    if len(shape) < 2:
        return 1, count
    rows, columns = shape[0], count // shape[0] if shape[0] else 0
    return (columns, rows) if info.transposed else (rows, columns)


def matrices(info: TensorInfo, stored: torch.Tensor) -> torch.Tensor:
    """(experts, ...): the matrices of a tensor that holds those of all."""
    assert info.expert is not None
    return info.expert.matrices(stored)


def as_matrix(info: TensorInfo, stored: torch.Tensor) -> torch.Tensor:
    """(out, in) view of a tensor or slice: GPT-2's Conv1D is stored (in, out), a vector is one row."""
    return stored.T if info.transposed else stored.reshape(matrix_shape(info))


def as_stored(info: TensorInfo, name: str, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`matrix` (out, in) as `like` is stored. Raises PruneError naming `name` where a value is not finite there."""
    oriented = matrix.T if info.transposed else matrix
    return to_stored(name, oriented, like.dtype).reshape(like.shape).contiguous()
