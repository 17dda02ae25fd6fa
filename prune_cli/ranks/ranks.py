"""This process among those of a run: its number, its share of the work, and what all of them exchange."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from prune_cli.ranks.channel import Channel

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """`count` processes on `nodes` machines, of which this one is `rank`; without a `channel` it is alone.

    What returns something of all is a step that every rank must take, in the same order.
    """

    rank: int = 0
    count: int = 1
    nodes: int = 1
    channel: Channel | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.channel is not None

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's of `items`: consecutive ones, as many as the others have or one less; the first rank has some."""
        return items[self._begin(len(items), self.rank) : self._begin(len(items), self.rank + 1)]

    def before(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the ranks before this one."""
        return items[: self._begin(len(items), self.rank)]

    def _begin(self, items: int, rank: int) -> int:
        return -(-rank * items // self.count)

    def gathered(self, value: T) -> list[T]:
        """`value` of every rank, in their order."""
        if self.channel is None:
            return [value]
        return [_received(data) for data in self.channel.gather(_sent(value))]

    def in_order(self, values: Sequence[T]) -> list[T]:
        """The values for each rank's `share`, put together again."""
        return [value for part in self.gathered(list(values)) for value in part]

    def from_rank(self, rank: int, make: Callable[[], T]) -> T:
        """What `make` returns on `rank`; it is called there alone."""
        if self.channel is None:
            return make()
        if self.rank == rank:
            value = make()
            self.channel.broadcast(_sent(value), rank)
            return value
        return _received(self.channel.broadcast(None, rank))

    def on_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank; it is called there alone."""
        return self.from_rank(0, make)

    def earliest(self, place: int) -> int:
        """The least `place` of any rank."""
        return place if self.channel is None else self.channel.least(place)

    def all_agree(self, this: bool) -> bool:
        """Whether `this` is so on every rank."""
        return bool(self.earliest(int(this)))

    def add_up(self, tensor: torch.Tensor) -> None:
        """Put the sum over all ranks into `tensor`: the same bits on each, and whenever there are as many ranks."""
        if self.channel is not None:
            self.channel.add_up(tensor)


def _sent(value: object) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def _received(data: bytes) -> Any:
    """Tensors of another rank's device come to this one's: its own may be on another machine, or full."""
    return torch.load(io.BytesIO(data), map_location=_here, weights_only=False)


def _here(storage: Any, device: str) -> Any:
    kind = device.partition(":")[0]
    own = device if kind == "cpu" else f"{kind}:{torch.get_device_module(kind).current_device()}"
    return torch.serialization.default_restore_location(storage, own)


ALONE = Ranks()
