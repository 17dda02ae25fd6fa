"""What paused batches bring waits in memory up to a limit, and beyond it in files without a name.

At a layer, every batch waits with the layer's input, which in an MLP is several times as wide as the hidden states;
before a block, with hidden states that the forward holds until the block is passed.
"""

from __future__ import annotations

import errno
import mmap
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from prune_cli.engine.activation_budget import USUAL, ActivationBudget
from prune_cli.engine.memory import mmap_large_allocations

_FULL = (errno.ENOSPC, errno.EDQUOT)


class ActivationOffload:
    """Where batches wait with what they bring, as `budget` has it; the files lie in `folder` while they are needed."""

    def __init__(self, folder: Path, budget: ActivationBudget = USUAL) -> None:
        self._folder = folder
        self._budget = budget
        self._held = self._held_states = 0
        self._parked: list[weakref.ref[torch.Tensor]] = []

    def next_layer(self) -> None:
        """The batches go on to another linear layer."""
        self._held = 0
        self._parked = [reference for reference in self._parked if reference() is not None]

    def next_block(self) -> None:
        """The batches go on to another block."""
        self._held_states = 0

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the input of a linear layer, and give it a place in a file, with the same bits, where memory has no
        more for it.
        """
        # Layers that share an input (q, k and v) bring the same tensor again.
        if any(reference() is tensor for reference in self._parked):
            return
        if self._held + tensor.nbytes <= self._budget.inputs or not self._park(tensor):
            self._held += tensor.nbytes

    def hold_states(self, tensors: Sequence[torch.Tensor]) -> None:
        """The same for the hidden states that a batch brings to a block."""
        limit = self._budget.states
        for tensor in tensors:
            if limit is None or self._held_states + tensor.nbytes <= limit or not self._park(tensor):
                self._held_states += tensor.nbytes

    def _park(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` now waits in a file."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.requires_grad:
            return False
        mmap_large_allocations()
        try:
            tensor.data = _in_a_file(tensor, self._folder)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            return False  # then it stays in memory
        self._parked.append(weakref.ref(tensor))
        return True


def _in_a_file(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        # Private: whoever changes it changes a copy. The map lives as long as the tensor does.
        mapped = mmap.mmap(file.fileno(), tensor.nbytes, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
