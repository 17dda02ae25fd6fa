"""A checkpoint whose zeros are left out by masks, as if it were dense: to look at, weight by weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_cli.checkpoint.bitmask_format import PARTS
from prune_cli.checkpoint.dtypes import data_bytes
from prune_cli.checkpoint.reader import Checkpoint, TensorEntry
from prune_cli.sparse.from_bitmask import bitmask_size, bitmask_weight, check_bitmasks, masked_modules

if TYPE_CHECKING:
    import torch


class BitmaskView(Checkpoint):
    """`stored` with `X.weight` in place of the parts of each; `form` is the format's name.

    Raises RequestError where a weight lacks one of its parts.
    """

    def __init__(self, stored: Checkpoint, form: str) -> None:
        check_bitmasks(stored)
        self._stored, self._form = stored, form
        self._modules = {f"{module}.weight": module for module in masked_modules(stored)}
        parts = {f"{module}.{part}": module for module in self._modules.values() for part in PARTS}
        entries: dict[str, TensorEntry] = {}
        for name, entry in stored.entries.items():
            if name not in parts:
                entries[name] = entry
            elif name.endswith(".compressed"):
                weight, size = f"{parts[name]}.weight", bitmask_size(stored, parts[name])
                end = entry.begin + data_bytes(entry.dtype, size[0] * size[1])
                entries[weight] = TensorEntry(weight, entry.file, entry.dtype, size, entry.begin, end)
        super().__init__(stored.folder, entries, stored.files, stored.index, stored.absent)

    def read(self, name: str) -> torch.Tensor:
        """The dense tensor. Raises PruneError, naming its parts, where they do not fit."""
        module = self._modules.get(name)
        return self._stored.read(name) if module is None else bitmask_weight(self._stored, module)

    def storage(self, name: str) -> tuple[int, str | None]:
        module = self._modules.get(name)
        if module is None:
            return self._stored.storage(name)
        names = (f"{module}.{part}" for part in PARTS)
        return sum(self._stored.entries[each].nbytes for each in names if each in self._stored.entries), self._form
