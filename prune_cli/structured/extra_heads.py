"""What becomes of extra heads (multi-token prediction) in a smaller model, and of what its config says of them."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any

from prune_cli.errors import RequestError
from prune_cli.model.extra_heads import counts_heads
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.structured.config import text_config
from prune_cli.structured.prepare import PreparedStructure

# MiniMax has a switch beside the count.
_USES = frozenset({"use_mtp"})
DROPPED = "left out by --drop-extra-heads"


def heads_to_drop(prepared: PreparedStructure) -> dict[str, str]:
    """The tensors of extra heads that the request leaves out, with the reason."""
    if not prepared.request.drop_extra_heads:
        return {}
    return {name: DROPPED for name, info in prepared.model.tensor_map.items() if info.head}


def count_no_heads(prepared: PreparedStructure, config: dict[str, Any]) -> None:
    """Have `config`, the output's config.json, count no extra heads, where the request leaves them out."""
    if not prepared.request.drop_extra_heads:
        return
    _count_none(config)
    text, part = text_config(config, prepared.model.config)
    # What is not written may stand for more than none.
    part |= {key: 0 for key, value in text.to_dict().items() if counts_heads(key, value) and value}


def _count_none(part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            _count_none(value)
        elif counts_heads(key, value):
            part[key] = 0
        elif key in _USES:
            part[key] = False


def by_head(infos: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """The tensors of each extra head."""
    heads: dict[str, list[str]] = {}
    for name, info in infos.items():
        if info.head:
            heads.setdefault(info.head, []).append(name)
    return heads


def by_layer(prepared: PreparedStructure, kept: Mapping[int | str, Sequence[int]]) -> dict[int, Sequence[int]]:
    """What is `kept` of blocks and heads, by the number in the names of both."""
    infos = prepared.model.tensor_map.values()
    numbers = {info.head: info.layer for info in infos if info.head is not None and info.layer is not None}
    places = ((numbers.get(place, -1) if isinstance(place, str) else place, each) for place, each in kept.items())
    return {number: each for number, each in places if number >= 0}


def whole_heads(prepared: PreparedStructure, axes: Container[str]) -> tuple[str, ...]:
    """Heads with a mixture that keeps all experts; `axes` are the parameters with an entry for each expert."""
    if prepared.request.drop_extra_heads:
        return ()
    infos = prepared.model.tensor_map
    cut = {name for name, info in infos.items() if info.parameter is not None and info.parameter in axes}
    return tuple(head for head, names in by_head(infos).items() if any(infos[name].twin in cut for name in names))


def refused_by_runtimes(head: str, keep: int) -> str:
    return (
        f"The extra head {head} keeps all of its experts, and config.json now says {keep} of every mixture: the model "
        "loads as ever, but a runtime that reads the head (speculative decoding) will refuse its shapes. Leave it out "
        "with --drop-extra-heads, or turn speculative decoding off."
    )


def too_wide(prepared: PreparedStructure, narrowed: Collection[str]) -> dict[str, str]:
    """Tensors that no model computes with and that no longer fit blocks whose tensors `narrowed` shrink, and why.

    Raises RequestError where one is of an extra head, which a runtime would compute with.
    """
    infos, found = prepared.model.tensor_map, heads_to_drop(prepared)
    for name, info in infos.items():
        twin = None if info.twin is None else infos[info.twin].entry
        if name in found or twin is None or twin.name not in narrowed or twin.shape != info.entry.shape:
            continue
        if info.head is None:
            found[name] = f"{info.reason}, and it is as wide as blocks were"
        else:
            raise RequestError(
                f"{name} of the extra head {infos[name].head} has the width that config.json gives all blocks, and "
                "nothing is known of what it computes with it: add --drop-extra-heads, or use --method depth."
            )
    return found
