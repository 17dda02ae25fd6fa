"""The tensors of a packed checkpoint by their values, as `verify` looks at those of plain and sparse ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.model.open_checkpoint import open_checkpoint
from prune_cli.sparse.bit_patterns import Stored, StoredTensors
from prune_cli.sparse.format import is_sparse, unsigned


class PackedBits(StoredTensors):
    """`view` has the values; zeros and equality are those of values, whatever their codes."""

    def __init__(self, folder: Path, view: Checkpoint) -> None:
        super().__init__(folder)
        self._view = view
        self.tensors = {
            name: Stored(entry.file, entry, None, view.stored_dtype(name)) for name, entry in view.entries.items()
        }

    def bits(self, name: str) -> np.ndarray:
        """All values, flat, as unsigned integers. Raises RequestError, naming the tensor, if it is damaged."""
        import torch

        as_bytes = self._view.read(name).contiguous().view(-1).view(torch.uint8).numpy()
        return as_bytes.view(unsigned(self.tensors[name].dense.dtype))


def stored_tensors(folder: Path) -> StoredTensors:
    """Raises RequestError for a folder that cannot be opened, or whose headers are not sound."""
    stored = StoredTensors(folder)
    if any(is_sparse(folder / file) for file in stored.checkpoint.files):
        return stored
    view = open_checkpoint(folder)
    return stored if type(view) is Checkpoint else PackedBits(folder, view)
