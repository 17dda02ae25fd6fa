"""What a checkpoint holds beyond its model, listed for a report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.report.types import NotLoaded

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def not_loaded(
    infos: Mapping[str, TensorInfo], checkpoint: Checkpoint, became: Callable[[Sequence[str]], str]
) -> tuple[NotLoaded, ...]:
    """Extra heads, each by itself, and other tensors without a parameter, by names that differ only in numbers.

    `became` tells in a few words what the output has of some tensors of the input.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, info in infos.items():
        if info.parameter is None:
            group = info.head or _NUMBER.sub("*", name)
            groups.setdefault((_kind(info), group), []).append(name)
    return tuple(
        NotLoaded(
            name=group,
            kind=kind,  # pyright: ignore[reportArgumentType]
            tensors=len(names),
            parameters=sum(checkpoint.entries[name].count for name in names),
            bytes=sum(checkpoint.storage(name)[0] for name in names),
            became=became(names),
        )
        for (kind, group), names in groups.items()
    )


def _kind(info: TensorInfo) -> str:
    return {"extra head": "extra head", "unused": "ignored by the class"}.get(info.role, "unknown to the class")
