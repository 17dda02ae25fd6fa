"""Keys of config.json from which transformers makes a list with an entry for each block, and others read directly.

What such a key says must be what the list says. One that cannot say it (a rule on numbers) is taken out: then who reads
the key learns of nothing, and not of the wrong blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prune_cli.errors import RequestError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.structured.config import config_from, text_config
from prune_cli.structured.depth.block_entries import BlockEntries


@dataclass(frozen=True)
class StaleKeys:
    """`lists` are the keys with an entry for each block that transformers keeps; `count` those with their number."""

    model: StreamedModel
    entries: BlockEntries
    lists: frozenset[str]
    count: frozenset[str]

    def mend(self, before: Mapping[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
        """Have no other key of `after` say another thing than its lists, as none did `before`.

        Both are whole config.json files. Returns the keys that had to go.
        """
        was, now = self._read(before), self._read(after)
        gone: list[str] = []
        for key in sorted(self.lists):
            if self._made(before, was, key) == was[key] and self._made(after, now, key) != now[key]:
                gone += [source for source in self._sources(before, was, key) if self._goes(after, now, key, source)]
        return tuple(gone)

    def _read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return config_from(dict(config), self.model).get_text_config().to_dict()

    def _made(self, config: Mapping[str, Any], read: Mapping[str, Any], key: str) -> Any:
        """The list `key` as transformers makes it of the other keys; None where it makes none."""
        trial = copy.deepcopy(dict(config))
        _, part = text_config(trial, self.model.config)
        part |= {other: read[other] for other in self.lists}
        del part[key]
        try:
            return self._read(trial).get(key)
        except RequestError:
            return None

    def _sources(self, config: Mapping[str, Any], read: Mapping[str, Any], key: str) -> Iterator[str]:
        """The keys without which another list would be made."""
        _, part = text_config(dict(config), self.model.config)
        for source in sorted(part.keys() - self.lists - self.count):
            trial = copy.deepcopy(dict(config))
            del text_config(trial, self.model.config)[1][source]
            if self._made(trial, read, key) != read[key]:
                yield source

    def _goes(self, after: dict[str, Any], now: Mapping[str, Any], key: str, source: str) -> bool:
        """Take `source` out of `after`, unless it counts the first blocks and the number that is left is right."""
        _, part = text_config(after, self.model.config)
        if source not in part or self._made(after, now, key) == now[key]:
            return False
        value = part.pop(source)
        if type(value) is int:
            part[source] = self.entries.first(value)
            if self._made(after, now, key) == now[key]:
                return False
            del part[source]
        return True
