"""Tensors that may hold numbers of blocks."""

from __future__ import annotations

import torch

from prune_cli.checkpoint.dtypes import BITS, FLOATS, torch_dtype
from prune_cli.errors import RequestError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo


def check_no_block_tables(model: StreamedModel) -> None:
    """Raise RequestError where a tensor beside the blocks may hold numbers of blocks, which would be other ones."""
    blocks = len(model.blocks)
    for name, info in model.tensor_map.items():
        if info.parameter is None or info.block is not None or not may_hold_numbers(info):
            continue
        values = model.checkpoint.read(name).flatten()
        if bool(((values >= 0) & (values < blocks)).all()) and not torch.equal(values, torch.arange(len(values))):
            raise RequestError(
                f"{name} holds whole numbers below {blocks}, which may be those of blocks, and blocks get new numbers: "
                "a table that is not known here, so blocks of this model cannot be removed."
            )


def may_hold_numbers(info: TensorInfo) -> bool:
    """Whether a tensor holds several whole numbers."""
    if info.entry.dtype in FLOATS or info.entry.count < 2 or BITS[info.entry.dtype] < 8:
        return False
    dtype = torch_dtype(info.entry.dtype)
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool
