"""The checkpoint's names after blocks were removed."""

from __future__ import annotations

from collections.abc import Sequence

from prune_cli.checkpoint.layout import Planned
from prune_cli.errors import RequestError
from prune_cli.model.streamed_model import Skeleton
from prune_cli.model.tensor_map import Place
from prune_cli.structured.plan import UNUSED


def without_blocks(model: Skeleton, kept: Sequence[int]) -> tuple[dict[str, Planned], dict[str, str]]:
    """All tensors of an output that has the blocks `kept`, renumbered; and why each of the others is gone.

    Raises RequestError for names that do not carry their block's number.
    """
    number = {block: new for new, block in enumerate(kept)}
    tensors: dict[str, Planned] = {}
    dropped: dict[str, str] = {}
    for name, place in model.places.items():
        if place.role == "unused":
            dropped[name] = UNUSED
        elif place.block is not None and place.block not in number:
            dropped[name] = f"block {place.block} was removed"
        else:
            new = name if place.block is None else _renumbered(name, place, number[place.block])
            tensors[new] = Planned(name)
    return tensors, dropped


def _renumbered(name: str, place: Place, new: int) -> str:
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    if not numbers or int(parts[numbers[0]]) != place.block:
        raise RequestError(f"{name} is a tensor of block {place.block}, but its name does not say so: not supported.")
    parts[numbers[0]] = str(new)
    return ".".join(parts)
