"""Inputs of paused batches wait in memory up to a limit, and beyond it in files without a name.

At a layer, every batch waits with the layer's input, which in an MLP is several times as wide as the hidden states.
"""

from __future__ import annotations

import errno
import mmap
import tempfile
import weakref
from pathlib import Path

import torch

from prune_cli.engine.memory import LARGE_INPUTS, mmap_large_allocations

_FULL = (errno.ENOSPC, errno.EDQUOT)


class ActivationOffload:
    """Where the inputs of batches wait that stop at the same layer; the files lie in `folder` while they are needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = 0
        self._parked: list[weakref.ref[torch.Tensor]] = []

    def next_layer(self) -> None:
        """The batches go on to another linear layer."""
        self._held = 0
        self._parked = [reference for reference in self._parked if reference() is not None]

    def hold(self, tensor: torch.Tensor) -> None:
        """Count `tensor`, and give it a place in a file, with the same bits, where memory has no more for it."""
        # Maps that share an input (q, k and v) bring the same tensor again.
        if tensor.device.type != "cpu" or any(reference() is tensor for reference in self._parked):
            return
        if self._held + tensor.nbytes <= LARGE_INPUTS or not tensor.is_contiguous():
            self._held += tensor.nbytes
            return
        mmap_large_allocations()
        try:
            tensor.data = _in_a_file(tensor, self._folder)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            return  # then it stays in memory
        self._parked.append(weakref.ref(tensor))


def _in_a_file(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        # Private: whoever changes it changes a copy. The map lives as long as the tensor does.
        mapped = mmap.mmap(file.fileno(), tensor.nbytes, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
