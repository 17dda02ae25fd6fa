"""The checkpoint's names after blocks were removed."""

from __future__ import annotations

from collections.abc import Sequence

from prune_cli.checkpoint.layout import OutputTensor
from prune_cli.errors import RequestError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.structured.plan import UNUSED


def without_blocks(model: StreamedModel, kept: Sequence[int]) -> tuple[dict[str, OutputTensor], dict[str, str]]:
    """All tensors of an output that has the blocks `kept`, renumbered; and why each of the others is gone.

    Raises RequestError for names that do not carry their block's number.
    """
    number = {block: new for new, block in enumerate(kept)}
    tensors: dict[str, OutputTensor] = {}
    dropped: dict[str, str] = {}
    for name, info in model.tensor_map.items():
        if info.role == "unused":
            dropped[name] = UNUSED
        elif info.block is not None and info.block not in number:
            dropped[name] = f"block {info.block} was removed"
        else:
            new = name if info.block is None else _renumbered(name, info, number[info.block])
            tensors[new] = OutputTensor(name)
    return tensors, dropped


def _renumbered(name: str, info: TensorInfo, new: int) -> str:
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    if not numbers or int(parts[numbers[0]]) != info.block:
        raise RequestError(f"{name} is a tensor of block {info.block}, but its name does not say so: not supported.")
    parts[numbers[0]] = str(new)
    return ".".join(parts)
