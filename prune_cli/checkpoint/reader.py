"""The safetensors of a checkpoint folder: every header checked before anything is read, every tensor read on demand."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from prune_cli.checkpoint.dtypes import BITS
from prune_cli.errors import RequestError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100_000_000
_MAX_FILE_NAME = 255
_MAX_DIMENSIONS = 64
_MAX_NUMBER = 2**63
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
    """An opened folder; `entries` in file order. Reading maps the files, so a tensor costs memory only when touched.

    `absent` are tensors that the index names and no file holds, with the file that it says; a model may need none.
    """

    folder: Path
    entries: dict[str, TensorEntry]
    files: tuple[str, ...]
    index: str | None
    absent: Mapping[str, str] = field(default_factory=dict)
    _handles: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Check every header in `folder`; raises RequestError for what is missing, truncated or inconsistent."""
        weight_map = _weight_map(folder)
        files = tuple(sorted(set(weight_map.values()))) if weight_map is not None else (SINGLE_FILE,)
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for entry in read_header(folder, file):
                if entry.name in entries:
                    raise RequestError(
                        f"{entry.name} is stored in both {entries[entry.name].file} and {file}: keep one of them."
                    )
                entries[entry.name] = entry
        for name, file in (weight_map or {}).items():
            if name in entries and entries[name].file != file:
                raise RequestError(f"{not_there(name, file)}: download the checkpoint again.")
        absent = {name: file for name, file in (weight_map or {}).items() if name not in entries}
        return cls(folder, entries, files, INDEX_FILE if weight_map is not None else None, absent)

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

    # Views whose files hold other tensors than they show say more in these.

    @property
    def shows_its_files(self) -> bool:
        """Whether an output of the same names and shapes can begin as a copy of the files."""
        return True

    def is_stored(self, name: str) -> bool:
        """Whether the bytes of the entry `name` lie as they are in its file."""
        return name in self.entries

    def storage(self, name: str) -> tuple[int, str | None]:
        """How many bytes an entry takes in its file, and in which form if not as plain numbers."""
        return self.entries[name].nbytes, None

    def stored_dtype(self, name: str) -> str:
        """The dtype of the entry in its file, of a packed one that of its codes."""
        return self.entries[name].dtype

    def reopened(self) -> Checkpoint:
        """The same through file handles of its own."""
        return Checkpoint.open(self.folder)

    def over(self, stored: Checkpoint) -> Checkpoint:
        """How an output is read whose files hold the same as those of this checkpoint."""
        return stored

    def stored_name(self, name: str) -> str:
        """The tensor in the files of such an output that is written for new values of the entry `name`."""
        return name

    def to_file(self, name: str, values: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """What is written there for `values` of an entry, or of one of its experts."""
        return values

    def from_file(self, name: str, stored: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """The values of what `to_file` gave."""
        return stored

    def zeros(self, name: str) -> int:
        """How many values of a float entry are 0."""
        values = self.read(name)
        return values.numel() - int(values.count_nonzero())

    def broken(self, name: str) -> str:
        """ "NaN" or "infinite values" where a float entry holds some, else empty."""
        from prune_cli.checkpoint.stored_values import broken

        return broken(self.read(name))

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


def not_there(name: str, file: str) -> str:
    return f"{INDEX_FILE} says that {name} is in {file}, but it is not there"


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard, or None for a checkpoint in one file."""
    if (folder / SINGLE_FILE).is_file():
        return None
    path = folder / INDEX_FILE
    if not path.is_file():
        raise RequestError(_why_no_safetensors(folder))
    try:
        index = strict_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no index of a checkpoint ({error}): download it again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise RequestError(f"{path} has no usable weight_map: download it again.")
    for file in dict.fromkeys(weight_map.values()):
        if file != Path(file).name or "\\" in file or file in {"", ".", ".."}:
            raise RequestError(f"{path} names the file {file!r} outside the folder: such an index is not followed.")
        if not file.endswith(".safetensors") or not file.isprintable() or len(file.encode()) > _MAX_FILE_NAME:
            raise RequestError(
                f"{path} names the file {reprlib.repr(file)}, expected a *.safetensors: download it again."
            )
        if not (folder / file).is_file():
            raise RequestError(
                f"{folder / file} is missing though {INDEX_FILE} names it: download the checkpoint again."
            )
    return weight_map


def _why_no_safetensors(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    gguf = [name for name in names if name.endswith(".gguf")]
    if ADAPTER_CONFIG in names:
        return f"{folder} holds a PEFT adapter, not a model: merge it into its base model first (merge_and_unload)."
    if gguf:
        return f"{folder} holds GGUF ({gguf[0]}): give the safetensors checkpoint that it was converted from."
    if pickles:
        return (
            f"{folder} holds pickled weights only ({pickles[0]}), which are never opened because they can run code: "
            "convert them with transformers' save_pretrained first."
        )
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: give the folder of a Hugging Face checkpoint."


def strict_json(data: bytes) -> Any:
    """JSON in UTF-8 without a name given twice, of which Python would silently take the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"it has {reprlib.repr(name)} twice")
            found[name] = value
        return found

    return json.loads(data.decode("utf-8"), object_pairs_hook=once)


def read_header(folder: Path, file: str) -> Iterator[TensorEntry]:
    """The entries of one shard in the order of their bytes, checked against each other and against the file's size."""
    path = folder / file
    text, size = header_bytes(path)
    try:
        header = strict_json(text)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        entries = [
            header_entry(name, file, fields, 8 + len(text)) for name, fields in header.items() if name != METADATA
        ]
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} has a damaged header ({error}): download it again.") from error
    position = 8 + len(text)
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise RequestError(
                f"{entry.name} in {path} overlaps another tensor or leaves a hole at byte {position}: "
                "download it again."
            )
        position = entry.end
    if position != size:
        raise RequestError(
            f"{path} is truncated or damaged: its header needs {position} bytes, it has {size}: download it again."
        )
    _check_with_library(path)
    return iter(sorted(entries, key=lambda entry: (entry.begin, entry.end)))


def header_bytes(path: Path) -> tuple[bytes, int]:
    """The header's text and the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise RequestError(f"{path} is a pointer of git-lfs, not the weights: run git lfs pull in its folder.")
        length = int.from_bytes(start, "little")
        if size < 8 or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise RequestError(
                f"{path} is truncated or no safetensors file: it has {size} bytes and its header asks for {length}: "
                "download it again."
            )
        return stream.read(length), size


def file_metadata(path: Path) -> dict[str, str] | None:
    """What the header of a safetensors file says about the file itself (`format: pt`)."""
    return json.loads(header_bytes(path)[0]).get(METADATA)


def _check_with_library(path: Path) -> None:
    """The library that reads the tensors has the last word: it also refuses what would be harmless here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise RequestError(f"{path} is refused by safetensors ({error}): download it again.") from error


def header_entry(name: str, file: str, fields: Any, data_begin: int) -> TensorEntry:
    """Raises ValueError that names the tensor for anything but {dtype, shape, data_offsets} that fit together."""
    if not name.isprintable():
        raise ValueError(f"the name {reprlib.repr(name)} is not printable")
    if not isinstance(fields, dict):
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} has the unknown dtype {reprlib.repr(dtype)}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has the shape {reprlib.repr(shape)} and data_offsets {reprlib.repr(offsets)}")
    begin, end = offsets
    if (end - begin) * 8 != prod(shape) * BITS[dtype]:
        raise ValueError(f"{name} has {end - begin} bytes for shape {reprlib.repr(shape)} of {dtype}")
    return TensorEntry(name, file, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _is_counts(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < _MAX_NUMBER for value in values)
    )
