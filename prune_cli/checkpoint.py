"""The safetensors of a checkpoint folder: every header checked before anything is read, every tensor read on demand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_cli.errors import RequestError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `begin` and `end` are absolute byte positions in `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass
class Checkpoint:
    """An opened folder; `entries` in file order. Reading maps the files, so a tensor costs memory only when touched."""

    folder: Path
    entries: dict[str, TensorEntry]
    files: tuple[str, ...]
    index: str | None
    _handles: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path, index_folder: Path | None = None) -> Checkpoint:
        """Check every header in `folder`; `index_folder` holds the index where it is not beside the shards yet.

        Raises RequestError for anything that is missing, truncated or inconsistent, by name.
        """
        weight_map = _weight_map(folder, index_folder or folder)
        files = tuple(dict.fromkeys(weight_map.values())) if weight_map is not None else (SINGLE_FILE,)
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for entry in _read_header(folder, file):
                if entry.name in entries:
                    raise RequestError(
                        f"{entry.name} is stored in both {entries[entry.name].file} and {file}: keep one of them."
                    )
                entries[entry.name] = entry
        for name, file in (weight_map or {}).items():
            if name not in entries or entries[name].file != file:
                raise RequestError(
                    f"{INDEX_FILE} says that {name} is in {file}, but it is not there: download the checkpoint again."
                )
        return cls(folder, entries, files, INDEX_FILE if weight_map is not None else None)

    @property
    def nbytes(self) -> int:
        return sum((self.folder / file).stat().st_size for file in self.files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` on the CPU in its stored dtype: a view on the mapped file, not a copy."""
        from safetensors import safe_open

        file = self.entries[name].file
        if file not in self._handles:
            self._handles[file] = safe_open(self.folder / file, framework="pt")
        return self._handles[file].get_tensor(name)

    def read_ahead(self, names: Iterator[str]) -> None:
        """Ask the system to bring these tensors into its cache while we compute; does nothing where it cannot."""
        if not hasattr(os, "posix_fadvise"):
            return
        for entry in (self.entries[name] for name in names):
            descriptor = os.open(self.folder / entry.file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, entry.begin, entry.nbytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _weight_map(folder: Path, index_folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard, or None for a checkpoint in one file."""
    if (folder / SINGLE_FILE).is_file():
        return None
    path = index_folder / INDEX_FILE
    if not path.is_file():
        raise RequestError(_why_no_safetensors(folder))
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names_ok = weight_map and all(isinstance(file, str) for file in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} is no index of a checkpoint ({error!r}): download it again.") from error
    if not names_ok:
        raise RequestError(f"{path} has no usable weight_map: download it again.")
    for file in dict.fromkeys(weight_map.values()):
        if file != Path(file).name or "\\" in file or file in {"", ".", ".."}:
            raise RequestError(f"{path} names the file {file!r} outside the folder: such an index is not followed.")
        if not (folder / file).is_file():
            raise RequestError(
                f"{folder / file} is missing though {INDEX_FILE} names it: download the checkpoint again."
            )
    return weight_map


def _why_no_safetensors(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    gguf = [name for name in names if name.endswith(".gguf")]
    if "adapter_config.json" in names:
        return f"{folder} holds a PEFT adapter, not a model: merge it into its base model first (merge_and_unload)."
    if gguf:
        return f"{folder} holds GGUF ({gguf[0]}): give the safetensors checkpoint that it was converted from."
    if pickles:
        return (
            f"{folder} holds pickled weights only ({pickles[0]}), which are never opened because they can run code: "
            "convert them with transformers' save_pretrained first."
        )
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: give the folder of a Hugging Face checkpoint."


def _read_header(folder: Path, file: str) -> Iterator[TensorEntry]:
    """The entries of one shard in the order of their bytes, checked against each other and against the file's size."""
    path = folder / file
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise RequestError(f"{path} is truncated or no safetensors file ({size} bytes): download it again.")
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = [_entry(name, file, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} has a damaged header ({error}): download it again.") from error
    position = 8 + length
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise RequestError(f"{entry.name} in {path} overlaps or leaves a hole at byte {position}: it is damaged.")
        position = entry.end
        yield entry
    if position != size:
        raise RequestError(
            f"{path} is truncated or damaged: its header needs {position} bytes, it has {size}: download it again."
        )


def _entry(name: str, file: str, fields: dict[str, Any], data_begin: int) -> TensorEntry:
    begin, end = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if fields["dtype"] not in _BITS:
        raise ValueError(f"{name} has the unknown dtype {fields['dtype']}")
    integers = all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in (begin, end, *shape)
    )
    if not integers or (end - begin) * 8 != prod(shape) * _BITS[fields["dtype"]]:
        raise ValueError(f"{name} has {end - begin} bytes for shape {list(shape)} of {fields['dtype']}")
    return TensorEntry(name, file, fields["dtype"], shape, data_begin + begin, data_begin + end)
