"""Extra heads of a checkpoint, as for multi-token prediction: blocks beyond the last, or tensors named as a head's.

transformers leaves them out when it loads a model; runtimes read them for speculative decoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.model.roles import Role
from prune_cli.model.tensor_info import TensorInfo

# Heads outside the list of blocks: mtp.layers.0 (Qwen), model.mtp_block.0 (ERNIE), ...
_HEAD = re.compile(r"((?:[^.]+\.)*?)(mtp|nextn)(_\w+)?(?=\.|$)")
_NUMBER = re.compile(r"(?:[^.]+\.)*?(\d+)\.")
_COUNTS = re.compile(r"(?=.*(mtp|nextn))(?=.*(num|layers|modules|depth))")
_NO_MAP = re.compile(r"embed|head|norm|gate\.|router")
_REASON = "extra heads, which transformers does not load with the model, are kept by default"


def with_heads(infos: Mapping[str, TensorInfo], blocks: int, counted: int) -> dict[str, TensorInfo]:
    """`infos` with all that can be told of tensors without a parameter: the block in their names, the head.

    A block beyond the `blocks` of the model is a head where the class ignores it or the config counts so many heads.
    """
    found = dict(infos)
    layers = layers_of(infos)
    ignored = {layer for name, layer in layers.items() if infos[name].role == "unused"}
    heads = {layer for layer in layers.values() if layer >= blocks and (layer < blocks + counted or layer in ignored)}
    twins = {_in_block(name): info for name, info in infos.items() if info.block is not None and _NUMBER.match(name)}
    for name, info in infos.items():
        if info.parameter is not None:
            continue
        layer = layers.get(name)
        head = _head_by_name(name) if layer is None else _block_name(name) if layer in heads else None
        twin = twins.get(_in_block(name)) if layer is not None else None
        found[name] = replace(info, layer=layer, head=head, twin=twin and twin.entry.name)
        if head is not None:
            found[name] = _like(found[name], twins)
    return found


def layers_of(infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The numbers in the names of tensors that the model has not, where those lie in its list of blocks."""
    blocks = ((_NUMBER.match(name), info.block) for name, info in infos.items() if info.block is not None)
    prefixes = {match.string[: match.start(1)] for match, block in blocks if match and int(match[1]) == block}
    others = {name: match for name, info in infos.items() if not info.parameter and (match := _NUMBER.match(name))}
    return {name: int(match[1]) for name, match in others.items() if name[: match.start(1)] in prefixes}


def _like(info: TensorInfo, twins: Mapping[str, TensorInfo]) -> TensorInfo:
    """Of a head: what the tensor of a block is that goes by the same name there, or what its own name says."""
    info = replace(info, role="extra head", reason=_REASON)
    twin = next((twins[ending] for ending in _endings(info.entry.name) if ending in twins), None)
    if twin is None:
        return replace(info, head_role=_role_by_name(info.entry))
    expert = twin.expert
    if expert is not None and expert.index is None:
        expert = replace(expert, experts=info.entry.shape[0])
    same = {"head_role": twin.role, "transposed": twin.transposed, "twin": twin.entry.name}
    return replace(info, expert=expert, **same)


def _role_by_name(entry: TensorEntry) -> Role:
    return "linear map" if len(entry.shape) == 2 and not _NO_MAP.search(entry.name) else "other"


def _in_block(name: str) -> str:
    match = _NUMBER.match(name)
    return name[match.end() :] if match else name


def _endings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[at:]) for at in range(1, len(parts)))


def _block_name(name: str) -> str:
    match = _NUMBER.match(name)
    return name[: match.end(1)] if match else name


def _head_by_name(name: str) -> str | None:
    match = _HEAD.match(name)
    return match and match[1] + (match[2] + "_*" if match[3] else match[2])


def counts_heads(key: object, value: object) -> bool:
    """Whether an entry of a config counts extra heads, as num_nextn_predict_layers does; keys may be numbers (Aria)."""
    return type(value) is int and isinstance(key, str) and _COUNTS.match(key) is not None


def counted_heads(config: Mapping[str, Any]) -> int:
    """How many extra heads `config` counts, at most."""
    inner = [counted_heads(value) for value in config.values() if isinstance(value, Mapping)]
    return max([0, *inner, *(value for key, value in config.items() if counts_heads(key, value))])
