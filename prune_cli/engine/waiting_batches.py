"""Batches that wait for the conductor: what each brings, and which of them wait at the same linear layer."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import greenlet
from torch import nn

from prune_cli.engine.same_inputs import SameInputs


@dataclass(frozen=True)
class Call:
    """A block's own forward with the arguments of one batch; each call is made with copies of its tensors."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.forward(*_copied(self.args), **dict(zip(self.kwargs, _copied(self.kwargs.values()), strict=True)))


class WaitingBatch:
    """One batch on its way: its coroutine, where it waits, and the tensors it waits with."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.coroutine = greenlet(run)
        self.place: Hashable = None
        self.arguments: list[torch.Tensor] = []
        self.call: Call | None = None

    @property
    def input(self) -> torch.Tensor | None:
        return self.arguments[0] if self.arguments else None


class Group:
    """Batches that wait at the same layer. The first of them goes ahead through the layers that read the same tensor.

    A vote is the number of the layer where a process would stop next, doubled, and one more where it shares its inputs
    with the stop before: the least vote wins, so nobody takes for shared what is new to another process.
    """

    def __init__(self, batches: list[WaitingBatch]) -> None:
        self.batches = batches
        self.inputs = [batch.input for batch in batches if batch.input is not None]
        self.brought = {batch.coroutine: SameInputs(batch.arguments) for batch in batches}
        self._continued = False

    def goes_on(self, waiting: Container[Hashable]) -> bool:
        """Whether the first batch is at a linear layer that is still to be stopped at, with the same inputs."""
        if not self.batches:
            return False
        first = self.batches[0]
        return first.place in waiting and self.brought[first.coroutine].repeated(first.arguments)

    def vote(self, modules: Sequence[nn.Module]) -> int:
        if not self.batches:
            return nowhere(modules)
        return 2 * modules.index(self.batches[0].place) + self._continued  # pyright: ignore[reportArgumentType]

    def stops_at(self, module: nn.Module) -> bool:
        """Whether it waits at `module`; the next vote is then for what comes after it."""
        self._continued = bool(self.batches) and self.batches[0].place is module
        return self._continued

    def some_come_later(self, module: nn.Module) -> bool:
        return any(batch.place is not module for batch in self.batches[1:])

    def leave(self) -> list[WaitingBatch]:
        """The batches behind the first, to go on; what came with the stop is let go."""
        self.inputs.clear()
        return self.batches[1:]


def nowhere(modules: Sequence[nn.Module]) -> int:
    """The vote of a process none of whose batches waits at a linear layer."""
    return 2 * len(modules)


def _copied(values: Iterable[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
