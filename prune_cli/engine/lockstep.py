"""Runs a model's own forward for every batch side by side, one block at a time.

Each batch is a coroutine (a greenlet) inside its own complete `model.forward`. It pauses where the next block begins,
so that the conductor can change the weights in memory, and at linear layers, so that a layer's inputs are known for all
batches before its weight is decided. Nothing is assumed about the code between the blocks: it is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.same_inputs import SameInputs
from prune_cli.engine.waiting_batches import Call, Group, WaitingBatch, nowhere
from prune_cli.errors import PruneError

# Called when one batch passes a linear layer in a rehearsal: (name of the layer, the tensors that it is called with).
Observe = Callable[[str, list[torch.Tensor]], None]
# Of where this process waits next, and the others of its run do: the earliest (a vote that all of them take).
Agree = Callable[[int], int]
# Stands in for a block's forward while one batch passes it: (the block's own forward, args, kwargs).
BlockOverride = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Lockstep:
    """A context in which `blocks` belong to the conductor; leaving it ends all coroutines and restores the blocks.

    `forward` is called once for each of `batches`; call `start`, then `through` for every block in order, then, if the
    outputs are wanted, `finish`. What batches wait with at layers is kept as `parking` says. Two of them may
    share the blocks: one is entered after the other, left before it, and they are moved one at a time. Where other
    processes have batches too, `agree` makes all of them stop at the same linear layers.
    """

    def __init__(
        self,
        forward: Callable[[Any], Any],
        blocks: Sequence[nn.Module],
        batches: Sequence[Any],
        parking: ActivationOffload | None = None,
        agree: Agree = lambda place: place,
    ) -> None:
        self._blocks = blocks
        self._agree = agree
        self._parking = parking
        self._batches = [WaitingBatch(lambda batch=batch: forward(batch)) for batch in batches]
        self._of_coroutine = {batch.coroutine: batch for batch in self._batches}
        self._here: list[WaitingBatch] = []
        self._shared = False
        self._rehearsing: int | None = None
        self._probing: int | None = None
        self._probed: Any = None
        self._instead: BlockOverride | None = None
        self._before: list[Any] = []

    def __enter__(self) -> Lockstep:
        self._before = [block.__dict__.get("forward") for block in self._blocks]
        for index, block in enumerate(self._blocks):
            block.forward = self._pausing_forward(index, block.forward)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for block, before in zip(self._blocks, self._before, strict=True):
            del block.forward
            if before is not None:
                block.forward = before
        for batch in self._batches:
            if batch.coroutine:
                batch.coroutine.throw()

    def _pausing_forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if getcurrent() not in self._of_coroutine:
                return original(*args, **kwargs)  # a batch of another Lockstep over the same blocks
            if self._parking is not None:
                self._parking.hold_states(tensors_in(args, kwargs)[:1])
            self._pause(index, tensors_in(args, kwargs)[:1], Call(original, args, kwargs))
            while index in (self._rehearsing, self._probing):
                if self._rehearsing == index:
                    self._observe_block(original, args, kwargs)
                else:
                    self._probed = Call(original, args, kwargs)()
                    self._pause("probed", tensors_in(args, kwargs)[:1], Call(original, args, kwargs))
            instead = self._instead
            output = original(*args, **kwargs) if instead is None else instead(original, args, kwargs)
            if index + 1 == len(self._blocks):
                self._pause(len(self._blocks))
            return output

        return forward

    def _observe_block(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = tensors_in(args, kwargs)
        before = [value._version for value in inputs]
        original(*args, **kwargs)
        if [value._version for value in inputs] != before:
            raise PruneError(
                "This architecture changes the inputs of its blocks in place, so a block cannot run twice: "
                "use --calibrate-by sublayer without --match-blocks."
            )
        self._pause("rehearsed", inputs[:1], Call(original, args, kwargs))

    def _pause(self, place: Hashable, arguments: Sequence[torch.Tensor] = (), call: Call | None = None) -> None:
        batch = self._of_coroutine[getcurrent()]
        batch.place, batch.arguments, batch.call = place, list(arguments), call
        parent = batch.coroutine.parent
        assert parent is not None
        parent.switch()
        batch.arguments, batch.call = [], None

    def _advance(self, waiting_batches: Sequence[WaitingBatch]) -> None:
        if self._parking is not None:
            self._parking.next_layer()
        self._go_on(waiting_batches)

    def _next_block(self) -> None:
        if self._parking is not None:
            self._parking.next_block()

    @staticmethod
    def _go_on(waiting_batches: Iterable[WaitingBatch]) -> None:
        for batch in waiting_batches:
            batch.coroutine.switch()

    def _all_wait_at(self, place: Hashable) -> None:
        astray = [batch.place for batch in self._batches if batch.coroutine.dead or batch.place != place]
        if astray:
            raise PruneError(
                f"The blocks of this architecture do not run one after the other (expected {place}, found "
                f"{astray[0]}), so it cannot be pruned with one block in memory; please report it."
            )

    def start(self) -> None:
        """Run every batch up to the first block."""
        self._next_block()
        self._advance(self._batches)
        self._all_wait_at(0)

    def run_block(self, index: int, instead: BlockOverride | None = None) -> None:
        """Run every batch through block `index` without a stop; `instead` is called in place of the block's forward."""
        self._instead = instead
        try:
            for _ in self.pause_at(index, {}):
                raise AssertionError("there is no layer to stop at")
        finally:
            self._instead = None

    def pause_at(
        self, index: int, layers: Mapping[nn.Module, str], *, again: bool = False
    ) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Run every batch through block `index`; yields each of `layers` (module -> name) when the batches wait there.

        With the name come the inputs, one per batch that waits, in a list that is emptied when they go on: when the
        next stop is asked for. Maps that read the same tensor are yielded while all batches but the first wait at the
        first of them. A layer that no batch reaches is not yielded, and one that only batches of other processes reach
        comes without inputs. The iterator must be run to its end. If they shall pass `again`, the batches wait before
        the block afterwards, with the inputs that they had.
        """
        waiting = set(layers)
        hooks = {module: module.register_forward_pre_hook(self._stop_at(module), with_kwargs=True) for module in layers}
        self._rehearsing = index if again else None
        self._next_block()
        try:
            self._advance(self._batches)
            modules, group = list(layers), Group([])
            while layers:
                if not group.goes_on(waiting):
                    self._go_on(group.leave())
                    group = Group(self._first_stop(layers, waiting))
                number = self._agree(group.vote(modules))
                if number == nowhere(modules):
                    break
                module, self._shared = modules[number // 2], number % 2 == 1
                waiting.remove(module)
                hooks.pop(module).remove()
                mine = group.stops_at(module)
                if mine and group.some_come_later(module):
                    hooks[module] = module.register_forward_pre_hook(_same_as(group.brought), with_kwargs=True)
                self._here = group.batches if mine else []
                yield layers[module], group.inputs if mine else []
                self._here = []
                if mine:
                    self._advance(group.batches[:1])
        finally:
            self._rehearsing = None
            for hook in hooks.values():
                hook.remove()
        self._all_wait_at("rehearsed" if again else index + 1)

    def _first_stop(self, layers: Iterable[nn.Module], waiting: Container[nn.Module]) -> list[WaitingBatch]:
        """The lanes at the earliest linear layer that any lane waits at; empty when all have left the block."""
        for module in layers:
            if module in waiting and (here := [batch for batch in self._batches if batch.place is module]):
                return here
        return []

    def _stop_at(self, module: nn.Module) -> Callable[..., None]:
        def pause(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = tensors_in(args, kwargs)
            if self._parking is not None:
                self._parking.hold(arguments[0])
            self._pause(module, arguments)

        return pause

    def observe_block(self, index: int, layers: Mapping[nn.Module, str], observe: Observe) -> None:
        """Run every batch through block `index` once for `observe` alone; `through` then runs it from the same inputs.

        The two-pass protocol of the authors' code of Wanda: all statistics of a block come from its dense weights.
        """

        def seen(name: str) -> Callable[..., None]:
            return lambda _module, args, kwargs: observe(name, tensors_in(args, kwargs))

        hooks = [module.register_forward_pre_hook(seen(name), with_kwargs=True) for module, name in layers.items()]
        self._rehearsing = index
        try:
            self._advance(self._batches)
        finally:
            self._rehearsing = None
            for hook in hooks:
                hook.remove()
        self._all_wait_at("rehearsed")

    def waiting(self) -> list[torch.Tensor | None]:
        """What each batch waits with: before a block, its hidden states."""
        return [batch.input for batch in self._batches]

    def calls(self) -> list[Call]:
        """Before a block, how each batch is about to call it: again and again, while the weights change."""
        return [batch.call for batch in self._batches if batch.call is not None]

    def arguments(self) -> list[list[torch.Tensor]]:
        """At a stop, all tensors that each of its batches brings, the input first."""
        return [batch.arguments for batch in self._here]

    def shares_inputs(self) -> bool:
        """At a stop, whether its batches, of all processes, bring the very tensors of the stop before."""
        return self._shared

    def here(self) -> list[int]:
        """At a stop, the numbers of its batches."""
        return [self._batches.index(batch) for batch in self._here]

    def current(self) -> int:
        """The number of the batch that runs now."""
        return self._batches.index(self._of_coroutine[getcurrent()])

    def probe(self, index: int) -> tuple[torch.Tensor | None, Any]:
        """Run the first batch through block `index`, for hooks to look at, from copies of its inputs.

        Returns the hidden states that go in and what the block returns; all batches wait before the block afterwards.
        """
        self._probing = index
        try:
            self._advance(self._batches[:1])
        finally:
            self._probing = None
        output, self._probed = self._probed, None
        return self._batches[0].input, output

    def stop_after_blocks(self, module: nn.Module) -> list[torch.Tensor]:
        """Run every batch from the last block to `module` (the output head); returns its inputs, one per batch."""
        hook = module.register_forward_pre_hook(self._stop_at(module), with_kwargs=True)
        try:
            self._advance(self._batches)
        finally:
            hook.remove()
        self._all_wait_at(module)
        self._here, self._shared = [batch for batch in self._batches if batch.input is not None], False
        return [batch.input for batch in self._here if batch.input is not None]

    def finish(self) -> Iterator[Any]:
        """Run one batch after the other to its end, in order; yields what its forward returned."""
        while self._batches:
            batch = self._batches.pop(0)
            output = batch.coroutine.switch()
            del self._of_coroutine[batch.coroutine], batch
            yield output


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among a call's arguments; the first of a block's are the hidden states."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def _same_as(brought: Mapping[greenlet, SameInputs]) -> Callable[..., None]:
    """A hook of a layer that was dealt with while a batch still waited at an earlier one that reads the same tensor."""
    left = dict(brought)

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before = left.pop(getcurrent(), None)
        if before is not None and not before.repeated(tensors_in(args, kwargs)):
            raise PruneError(
                "The batches do not take the same way through a block of this architecture, so its layers cannot be "
                "pruned one after the other; please report it."
            )

    return check
