"""A packed checkpoint as if it were plain: a weight is decoded when it is read, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING

from prune_cli.checkpoint.dtypes import data_bytes, torch_dtype
from prune_cli.checkpoint.reader import Checkpoint, TensorEntry
from prune_cli.packed.weight import CoupledGroup, PackedWeight

if TYPE_CHECKING:
    import torch


class Dequantised(Checkpoint):
    """`stored` with the values of `weights` in place of their parts; entries are those of the plain files.

    Values are exact in the dtypes of the entries, unless `half`: then none is wider than 16 bits, which rounds.
    """

    def __init__(self, stored: Checkpoint, weights: Iterable[PackedWeight], *, half: bool = False) -> None:
        self.stored = stored
        self.weights: dict[str, PackedWeight] = {weight.name: weight for weight in weights}
        self.half = half
        hidden = {name for w in self.weights.values() for name in (*w.parts.values(), *w.beside)}
        by_codes = {weight.parts["codes"]: weight for weight in self.weights.values()}
        entries: dict[str, TensorEntry] = {}
        for name, entry in stored.entries.items():
            if name in by_codes:
                plain = self._plain_entry(by_codes[name], entry)
                entries[plain.name] = plain
            elif name not in hidden:
                entries[name] = entry
        super().__init__(stored.folder, entries, stored.files, stored.index, stored.absent)

    def _plain_entry(self, weight: PackedWeight, codes: TensorEntry) -> TensorEntry:
        dtype = "BF16" if self.half and weight.dtype == "F32" else weight.dtype
        end = codes.begin + data_bytes(dtype, prod(weight.shape))
        return TensorEntry(weight.name, codes.file, dtype, weight.shape, codes.begin, end)

    def as_half(self) -> Dequantised:
        return Dequantised(self.stored, self.weights.values(), half=True)

    def exact(self) -> Dequantised:
        return Dequantised(self.stored, self.weights.values())

    def is_stored(self, name: str) -> bool:
        return name in self.entries and name not in self.weights

    def parts(self, name: str, expert: int | None = None) -> dict[CoupledGroup, torch.Tensor]:
        """The stored tensors of a packed weight, or of one of its experts'."""
        found: dict[CoupledGroup, torch.Tensor] = {}
        for part, stored in self.weights[name].parts.items():
            tensor = self.stored.read(stored)
            found[part] = tensor if expert is None else tensor[expert]
        return found

    def read(self, name: str) -> torch.Tensor:
        """The values. Raises RequestError, naming the tensor, where codes or scales stand for no number."""
        if name not in self.weights:
            return self.stored.read(name)
        return self.weights[name].decode(self.parts(name)).to(torch_dtype(self.entries[name].dtype))

    def zeros(self, name: str) -> int:
        """Counted in the codes where these tell."""
        known = self._zeros_in_codes(name)
        return super().zeros(name) if known is None else known

    def broken(self, name: str) -> str:
        return super().broken(name) if self._zeros_in_codes(name) is None else ""

    def _zeros_in_codes(self, name: str) -> int | None:
        if name not in self.weights:
            return None
        return self.weights[name].zeros(self.parts(name), torch_dtype(self.entries[name].dtype))

    def read_ahead(self, names: Iterator[str]) -> None:
        self.stored.read_ahead(iter([part for name in names for part in self._stored_names(name)]))

    def _stored_names(self, name: str) -> Iterable[str]:
        return self.weights[name].parts.values() if name in self.weights else (name,)

    def storage(self, name: str) -> tuple[int, str | None]:
        """Of a packed weight with all that stands beside it."""
        if name not in self.weights:
            return super().storage(name)
        weight = self.weights[name]
        names = (*weight.parts.values(), *weight.beside)
        return sum(self.stored.entries[each].nbytes for each in names), weight.label

    def stored_dtype(self, name: str) -> str:
        if name not in self.weights:
            return super().stored_dtype(name)
        return self.stored.entries[self.weights[name].parts["codes"]].dtype

    # --- an output: plain if the view is by halves, else packed as the input -------------------------------------

    def reopened(self) -> Checkpoint:
        return Dequantised(self.stored.reopened(), self.weights.values(), half=self.half)

    def over(self, stored: Checkpoint) -> Checkpoint:
        return stored if self.half else Dequantised(stored, self.weights.values())

    def stored_name(self, name: str) -> str:
        return self.weights[name].parts["codes"] if self._packs(name) else name

    def to_file(self, name: str, values: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """New codes on the weight's own scales."""
        if not self._packs(name):
            return values
        return self._weight(name, expert).encode(self.parts(name, expert), values.cpu())

    def from_file(self, name: str, stored: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        if not self._packs(name):
            return stored
        return self._weight(name, expert).decode({**self.parts(name, expert), "codes": stored})

    def _packs(self, name: str) -> bool:
        """Whether an output holds codes of the entry `name`."""
        return not self.half and name in self.weights

    def _weight(self, name: str, expert: int | None) -> PackedWeight:
        return self.weights[name] if expert is None else self.weights[name].one_expert()
