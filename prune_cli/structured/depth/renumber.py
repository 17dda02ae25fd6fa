"""The checkpoint's names after blocks were removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prune_cli.checkpoint.layout import OutputTensor
from prune_cli.errors import RequestError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo


def without_blocks(
    model: StreamedModel, kept: Sequence[int], left_out: Mapping[str, str]
) -> tuple[dict[str, OutputTensor], dict[str, str]]:
    """All tensors of an output that has the blocks `kept`, renumbered; and why each of the others is gone.

    Blocks beyond the last, extra heads, stay behind the last, but for what is `left_out`, with the reason. Raises
    RequestError for names that do not carry their block's number.
    """
    tensors: dict[str, OutputTensor] = {}
    dropped = dict(left_out)
    for name, info in model.tensor_map.items():
        if name in dropped:
            continue
        layer = layer_of(info)
        if layer is None:
            tensors[name] = OutputTensor(name)
            continue
        new = new_number(layer, len(model.blocks), kept)
        if new is None:
            dropped[name] = f"block {layer} was removed"
        else:
            tensors[_renumbered(name, layer, new)] = OutputTensor(name)
    return tensors, dropped


def layer_of(info: TensorInfo) -> int | None:
    """The number of the block that a tensor is of or, where the model has it not, that its name tells."""
    return info.block if info.block is not None else info.layer


def new_number(layer: int, blocks: int, kept: Sequence[int]) -> int | None:
    """Of a block, or of one beyond the `blocks` there were, once only `kept` are left; None if it is gone."""
    if layer >= blocks:
        return layer - blocks + len(kept)
    return list(kept).index(layer) if layer in kept else None


def _renumbered(name: str, layer: int, new: int) -> str:
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    if not numbers or int(parts[numbers[0]]) != layer:
        raise RequestError(f"{name} is a tensor of block {layer}, but its name does not say so: not supported.")
    parts[numbers[0]] = str(new)
    return ".".join(parts)
