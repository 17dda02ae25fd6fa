"""Where every tensor of the output will lie, settled before its first byte is written.

An output keeps the input's shards: a tensor lies in the file of the one it takes the place of, in the same order. One
with the input's shapes starts as a copy of its files; another is laid out here, header by header and range by range.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING

from prune_cli.checkpoint.dtypes import data_bytes
from prune_cli.checkpoint.reader import INDEX_FILE, Checkpoint, TensorEntry, file_metadata

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 24
_ALIGNMENT = 8


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output: the input's tensor whose place it takes, and its new shape.

    Without a shape it is the input's tensor, byte for byte (decoded, if the input is a view); with one, its bytes come
    later through `write_block`.
    """

    source: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """The output's tensors, in file order, and its files; `index` is the text of its index, None for a single file.

    `headers` is empty where the input's files are copied as they are; `copied` maps output names to input names.
    """

    entries: dict[str, TensorEntry]
    files: tuple[str, ...]
    index: str | None
    headers: Mapping[str, bytes]
    copied: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Of all files of weights, headers included."""
        return sum(entry.nbytes for entry in self.entries.values()) + sum(map(len, self.headers.values()))

    @property
    def sha256(self) -> str:
        """Of everything that the files will be made from, to tell one layout from another."""
        digest = hashlib.sha256(json.dumps(self.copied).encode())
        for file in self.files:
            digest.update(file.encode() + self.headers.get(file, b""))
        return digest.hexdigest()

    def make_file(self, file: str, source: Checkpoint, folder: Path) -> None:
        """Write one of `files` into `folder`: all that the input has of it, the rest of its size reserved."""
        if not self.headers:
            shutil.copyfile(source.folder / file, folder / file)
            return
        entries = [entry for entry in self.entries.values() if entry.file == file]
        with (folder / file).open("wb") as output, (source.folder / file).open("rb") as given:
            output.write(self.headers[file])
            _reserve(output, max((entry.end for entry in entries), default=len(self.headers[file])))
            for entry in entries:
                if entry.name in self.copied and source.is_stored(self.copied[entry.name]):
                    _copy_range(given, source.entries[self.copied[entry.name]], output, entry)
                elif entry.name in self.copied:
                    _write_tensor(source.read(self.copied[entry.name]), output, entry)
            output.flush()
            os.fdatasync(output.fileno())


def same_layout(source: Checkpoint) -> Layout:
    """An output of the input's own names and shapes."""
    return Layout(source.entries, source.files, index_of(source) if source.index else None, {}, {})


def index_of(source: Checkpoint) -> str:
    """The input's index as it stands, mended where transformers would not load it or it names what no file holds."""
    text = (source.folder / INDEX_FILE).read_text(encoding="utf-8")
    sound = isinstance(json.loads(text).get("metadata"), dict) and not source.absent
    return text if sound else index_for(source, source.entries)


def changed_layout(source: Checkpoint, tensors: Mapping[str, OutputTensor]) -> Layout:
    """An output of `tensors` (name -> what it is); a shard that none of them lies in is left out."""
    order = {name: place for place, name in enumerate(source.entries)}
    names = sorted(tensors, key=lambda name: order[tensors[name].source])
    entries: dict[str, TensorEntry] = {}
    headers: dict[str, bytes] = {}
    for file in source.files:
        inside = [name for name in names if source.entries[tensors[name].source].file == file]
        if inside:
            headers[file], placed = _header(source, file, {name: tensors[name] for name in inside})
            entries |= {entry.name: entry for entry in placed}
    return Layout(
        entries=entries,
        files=tuple(headers),
        index=index_for(source, entries) if source.index else None,
        headers=headers,
        copied={name: tensors[name].source for name in names if tensors[name].shape is None},
    )


def _header(source: Checkpoint, file: str, tensors: Mapping[str, OutputTensor]) -> tuple[bytes, list[TensorEntry]]:
    """The bytes before the data of a safetensors file, and where its tensors lie behind them."""
    metadata = file_metadata(source.folder / file)
    fields: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    spans: list[tuple[str, str, tuple[int, ...], int, int]] = []
    position = 0
    for name, planned in tensors.items():
        old = source.entries[planned.source]
        shape = old.shape if planned.shape is None else planned.shape
        end = position + data_bytes(old.dtype, prod(shape))
        fields[name] = {"dtype": old.dtype, "shape": list(shape), "data_offsets": [position, end]}
        spans.append((name, old.dtype, shape, position, end))
        position = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    begin = len(header)
    return header, [TensorEntry(name, file, dtype, shape, begin + a, begin + b) for name, dtype, shape, a, b in spans]


def index_for(source: Checkpoint, entries: Mapping[str, TensorEntry]) -> str:
    """The input's index with the output's names and totals."""
    index = json.loads((source.folder / INDEX_FILE).read_text(encoding="utf-8"))
    given = index.get("metadata")
    metadata = dict(given) if isinstance(given, dict) else {}
    metadata["total_size"] = sum(entry.nbytes for entry in entries.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(entry.count for entry in entries.values())
    weight_map = {name: entries[name].file for name in sorted(entries)}
    return json.dumps({**index, "metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def _reserve(file: IO[bytes], size: int) -> None:
    """Give the file its size now, so that a full disk shows before the work does."""
    file.flush()
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _write_tensor(tensor: torch.Tensor, output: IO[bytes], new: TensorEntry) -> None:
    """A tensor that `source` decodes: its values take the place of the bytes."""
    import torch

    output.seek(new.begin)
    output.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _copy_range(given: IO[bytes], old: TensorEntry, output: IO[bytes], new: TensorEntry) -> None:
    given.seek(old.begin)
    output.seek(new.begin)
    left = old.nbytes
    while left:
        chunk = given.read(min(left, _CHUNK))
        output.write(chunk)
        left -= len(chunk)
