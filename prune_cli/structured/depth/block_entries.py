"""Entries of a config that speak of single blocks, for a model that has lost some: lists, patterns, numbers, counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_cli.structured.depth.renumber import new_number

# Lists of block numbers; every other list with as many entries as there are blocks has one for each.
_NUMBERS = frozenset(
    {
        "attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "global_attention_blocks", "local_layer_ids",
        "mlp_only_layers", "moe_layers", "rope_scaling_layers",
    }
)  # fmt: skip
# The same, counted from one.
_NUMBERS_FROM_ONE = frozenset({"full_attn_layers", "kda_layers", "ple_layer_ids"})
# For each block the number of another, whose keys and values it uses.
_SOURCES = frozenset({"kv_source_layers"})
# How many of the first blocks are of another kind.
_FIRST = frozenset({"dense_mlp_idx", "first_k_dense_replace", "num_hash_layers"})
_NOT_BY_BLOCK = ("architectures", "_token_id", "suppress_tokens", "section", "factor")
_NO_BLOCKS_INSIDE = frozenset({"quantization_config", "compression_config", "rope_parameters", "rope_scaling"})
_JOINED = re.compile(r"\d+(\s*,\s*\d+)+")


@dataclass(frozen=True)
class BlockEntries:
    """The blocks `kept` of `blocks`.

    Entries of `heads` blocks for extra heads may follow those of the blocks, and go if `drops_heads`.
    """

    blocks: int
    heads: int
    kept: Sequence[int]
    drops_heads: bool = False

    def changed(self, key: str, value: Any) -> Any:
        """What stands under `key` for the kept blocks; None for what does not speak of single blocks."""
        if key in _FIRST and type(value) is int:
            return self.first(value)
        if isinstance(value, list | tuple):
            return self._list(key, value)
        if isinstance(value, str):
            return self._text(key, value)
        if isinstance(value, Mapping):
            return self._mapping(key, value)
        return None

    def first(self, count: int) -> int:
        """How many of the first `count` blocks stay."""
        return sum(block < count for block in self.kept)

    def _list(self, key: str, value: Sequence[Any]) -> list[Any] | None:
        if not value or key.endswith(_NOT_BY_BLOCK):
            return None
        numbers = all(type(item) is int for item in value)
        if numbers and key in _NUMBERS:
            return self._numbers(value)
        if numbers and key in _NUMBERS_FROM_ONE:
            return [number + 1 for number in self._numbers([item - 1 for item in value])]
        if not self._one_each(value):
            return None
        stay = [value[block] for block in self.kept]
        if numbers and key in _SOURCES:
            stay = [item if (new := self._new(item)) is None else new for item in stay]
        return [*stay, *([] if self.drops_heads else value[self.blocks :])]

    def _text(self, key: str, value: str) -> str | None:
        """One letter a block, or numbers of blocks."""
        if key.endswith("pattern") and self._one_each(value):
            return "".join(value[block] for block in self.kept) + ("" if self.drops_heads else value[self.blocks :])
        if "layer" in key and _JOINED.fullmatch(value):
            return ",".join(map(str, self._numbers([int(number) for number in value.split(",")])))
        return None

    def _mapping(self, key: str, value: Mapping[Any, Any]) -> dict[str, Any] | None:
        if "layer" in key and value and all(str(number).isdecimal() for number in value):
            renumbered = ((self._new(int(number)), entry) for number, entry in value.items())
            return {str(new): entry for new, entry in renumbered if new is not None}
        if key in _NO_BLOCKS_INSIDE:
            return None
        lists = {str(name): entry for name, entry in value.items() if isinstance(entry, list | str)}
        inner = {name: changed for name, entry in lists.items() if (changed := self.changed(name, entry)) is not None}
        return {**value, **inner} if inner else None

    def _one_each(self, value: Sequence[Any]) -> bool:
        return len(value) in (self.blocks, self.blocks + self.heads)

    def _numbers(self, value: Sequence[int]) -> list[int]:
        return sorted(new for number in value if (new := self._new(number)) is not None)

    def _new(self, number: int) -> int | None:
        if number >= self.blocks and self.drops_heads:
            return None
        return new_number(number, self.blocks, self.kept)
