"""Leaving a block out of a forward pass: the hidden states that come to it go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from prune_cli.engine.block_outputs import hidden_states
from prune_cli.engine.lockstep import BlockOverride, tensors_in
from prune_cli.errors import PruneError


class Skipping:
    """What each block returns beside hidden states, once one batch has shown it."""

    def __init__(self) -> None:
        self._returned: dict[int, Callable[[torch.Tensor], Any]] = {}

    def knows(self, block: int) -> bool:
        """Whether `block` can be left out without a run of it, and so without its weights."""
        return block in self._returned

    def skip(self, block: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the block's forward. Raises PruneError where the block changes the shape of the states."""
        hidden = tensors_in(args, kwargs)[0]
        if block in self._returned:
            return self._returned[block](hidden)
        output = original(*args, **kwargs)
        if hidden_states(output).shape != hidden.shape:
            raise PruneError(f"Block {block} changes the shape of the hidden states, so it cannot be left out.")
        self.remember(block, output)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    def watching(self, block: int) -> BlockOverride:
        """In place of the forward of `block`: it runs, and is known afterwards if it returns hidden states alone."""

        def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = original(*args, **kwargs)
            self.remember(block, output)
            return output

        return run

    def remember(self, block: int, output: Any) -> None:
        """What a block returns beside hidden states, where that is nothing: then it need not run to be left out."""
        if isinstance(output, torch.Tensor):
            self._returned[block] = lambda hidden: hidden
        elif all(item is None for item in output[1:]):
            nothing = output[1:]
            self._returned[block] = lambda hidden: (hidden, *nothing)
