"""What a sparse shard says about itself, checked before anything is decoded: docs/sparse-safetensors.md."""

from __future__ import annotations

import json
import re
import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from prune_cli.checkpoint.dtypes import BITS
from prune_cli.checkpoint.reader import METADATA, TensorEntry, file_metadata, header_entry, read_header, strict_json
from prune_cli.errors import RequestError
from prune_cli.sparse.coding import BITMASK, DENSE, mask_bytes
from prune_cli.sparse.deflate import DEFLATED
from prune_cli.sparse.groups import CodingError, GroupCode

# The second has deflated values; files without them are of the first.
VERSION, DEFLATING_VERSION = 1, 2
VERSIONS = (VERSION, DEFLATING_VERSION)
METADATA_KEY = "prune_cli_sparse"
MASK_SUFFIX, HIGH_SUFFIX = ".sparse_mask", ".sparse_high"
QUANT_METHOD = "prune-cli-sparse"
_FIELDS = {"version", "tensors", "dense_header", "dense_header_crc32"}
_DEFLATE = "+deflate"
_CHECKSUM = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True)
class SparseTensor:
    """One tensor of a sparse shard: what it is once decoded (`crc32` is of those bytes), and where its parts lie.

    With `high`, that holds the deflated high bytes of the values, and `values` the others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    crc32: int
    values: TensorEntry
    mask: TensorEntry | None
    high: TensorEntry | None = None

    @property
    def parts(self) -> list[TensorEntry]:
        return [part for part in (self.values, self.mask, self.high) if part is not None]

    @property
    def stored_as(self) -> str:
        return self.encoding + (_DEFLATE if self.high else "")

    @property
    def is_as_dense(self) -> bool:
        return self.mask is None and self.high is None

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def row(self) -> int:
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class SparseShard:
    """A checked sparse shard; `dense_header` is the text of the header of the dense shard it was made from."""

    path: Path
    tensors: Mapping[str, SparseTensor]
    dense_header: bytes
    dense_entries: Mapping[str, TensorEntry]


def item_bytes(dtype: str) -> int | None:
    """Bytes of one element; None for dtypes of less than a byte."""
    return BITS[dtype] // 8 or None


def unsigned(dtype: str) -> np.dtype:
    return np.dtype(f"<u{item_bytes(dtype)}") if BITS[dtype] in (8, 16, 32, 64) else np.dtype(np.uint8)


def may_be_encoded(dtype: str, shape: tuple[int, ...]) -> bool:
    """Only what has two dimensions or more: its values, in one, then fit no model that does not decode them."""
    return item_bytes(dtype) is not None and len(shape) >= 2


def is_reserved(name: str) -> bool:
    """Whether a tensor's name is one that this format gives to parts of others."""
    return name.endswith((MASK_SUFFIX, HIGH_SUFFIX))


def is_sparse(path: Path) -> bool:
    return METADATA_KEY in (file_metadata(path) or {})


def describe(tensors: Mapping[str, SparseTensor], dense_header: bytes) -> str:
    """The text under METADATA_KEY; the inverse of what `open_shard` checks."""
    listed = {
        name: {
            "encoding": t.stored_as,
            "dtype": t.dtype,
            "shape": list(t.shape),
            "crc32": f"{t.crc32:08x}",
        }
        for name, t in tensors.items()
    }
    document = {
        "version": DEFLATING_VERSION if any(t.high for t in tensors.values()) else VERSION,
        "tensors": listed,
        "dense_header": dense_header.decode("utf-8"),
        "dense_header_crc32": f"{zlib.crc32(dense_header):08x}",
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def open_shard(path: Path) -> SparseShard:
    """Read and check a sparse shard's header. Raises RequestError that names the tensor for all that does not fit."""
    entries = {entry.name: entry for entry in read_header(path.parent, path.name)}
    try:
        document = strict_json((file_metadata(path) or {}).get(METADATA_KEY, "null").encode())
        if not isinstance(document, dict):
            raise CodingError(f"it has no {METADATA_KEY} in its metadata")
        version = document.get("version")
        if type(version) is not int or version not in VERSIONS:
            raise CodingError(
                f"it has version {reprlib.repr(version)} of sparse safetensors and this prune-cli "
                f"reads {VERSION} and {DEFLATING_VERSION}: update prune-cli"
            )
        listed = document.get("tensors")
        if document.keys() != _FIELDS or not isinstance(listed, dict):
            raise CodingError(f"its {METADATA_KEY} is not the one of version {version}")
        tensors = {name: _tensor(name, fields, entries) for name, fields in listed.items()}
        if version == VERSION and any(t.high for t in tensors.values()):
            raise CodingError(f"it has version {VERSION}, which has no deflated values")
        _check_all_listed(tensors, entries)
        dense_header, dense_entries = _dense_header(document, path.name, tensors)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no sound sparse shard: {error}.") from error
    return SparseShard(path, tensors, dense_header, dense_entries)


def _tensor(name: str, fields: Any, entries: Mapping[str, TensorEntry]) -> SparseTensor:
    if not isinstance(fields, dict) or fields.keys() != {"encoding", "dtype", "shape", "crc32"}:
        raise CodingError(f"{reprlib.repr(name)} is not described by encoding, dtype, shape and crc32")
    encoding, dtype, shape, crc32 = (fields[key] for key in ("encoding", "dtype", "shape", "crc32"))
    if not isinstance(encoding, str) or not isinstance(dtype, str) or not isinstance(crc32, str):
        raise CodingError(f"{name} has the encoding {reprlib.repr(encoding)} of {reprlib.repr(dtype)}")
    if dtype not in BITS or not _CHECKSUM.fullmatch(crc32):
        raise CodingError(f"{name} has the dtype {reprlib.repr(dtype)} and the checksum {reprlib.repr(crc32)}")
    # The dense header's own check knows what a shape may be.
    header_entry(name, "", {"dtype": dtype, "shape": shape, "data_offsets": [0, _bytes(shape, dtype)]}, 0)
    plain = encoding.removesuffix(_DEFLATE)
    tensor = SparseTensor(
        name, dtype, tuple(shape), plain, int(crc32, 16), _stored(name, name, entries),
        None if plain == DENSE else _stored(name, name + MASK_SUFFIX, entries),
        None if plain == encoding else _stored(name, name + HIGH_SUFFIX, entries),
    )  # fmt: skip
    try:
        _check_parts(tensor)
    except CodingError as error:
        raise CodingError(f"{name}: {error}") from None
    return tensor


def _bytes(shape: Any, dtype: str) -> int:
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise CodingError(f"a shape is {reprlib.repr(shape)}")
    return prod(shape) * BITS[dtype] // 8


def _stored(name: str, part: str, entries: Mapping[str, TensorEntry]) -> TensorEntry:
    if part not in entries:
        raise CodingError(f"{name} is listed, but {part} is not stored")
    return entries[part]


def _check_parts(tensor: SparseTensor) -> None:
    """The stored values and mask have the dtypes and sizes that the encoding asks for."""
    if not tensor.is_as_dense and not may_be_encoded(tensor.dtype, tensor.shape):
        raise CodingError(f"a {tensor.dtype} of shape {list(tensor.shape)} is never encoded")
    kept = _check_values(tensor)
    if tensor.mask is None:
        if kept != tensor.count:
            raise CodingError(f"it has {kept} values, expected {tensor.count}")
        return
    size = mask_bytes(tensor.encoding, tensor.count)
    if tensor.mask.dtype != "U8" or tensor.mask.shape != (size,):
        told = f"{tensor.mask.dtype} of shape {list(tensor.mask.shape)}"
        raise CodingError(f"its mask is {told}, expected U8 of shape [{size}]")
    most = tensor.count
    if tensor.encoding != BITMASK:
        code = GroupCode.named(tensor.encoding)
        most = tensor.count // code.of * code.keep
    if not (kept <= most if tensor.encoding == BITMASK else kept == most):
        raise CodingError(f"it has {kept} values, expected at most {most}")


def _check_values(tensor: SparseTensor) -> int:
    """How many values are stored."""
    values, high = tensor.values, tensor.high
    if high is None:
        shape = tensor.shape if tensor.mask is None else (values.count,)
        if values.dtype != tensor.dtype or values.shape != shape:
            told = f"{values.dtype} of shape {list(values.shape)}"
            raise CodingError(f"its values are {told}, expected {tensor.dtype} of shape {list(shape)}")
        return values.count
    if tensor.dtype not in DEFLATED:
        raise CodingError(f"values of {tensor.dtype} are never deflated")
    others = unsigned(tensor.dtype).itemsize - 1
    if (values.dtype, high.dtype) != ("U8", "U8") or len(values.shape) != 1 or len(high.shape) != 1:
        raise CodingError(f"its values are {values.dtype} and {high.dtype}, expected two rows of U8")
    if values.count % others:
        raise CodingError(f"its values have {values.count} low bytes, expected {others} of each")
    return values.count // others


def _check_all_listed(tensors: Mapping[str, SparseTensor], entries: Mapping[str, TensorEntry]) -> None:
    known = {part.name for t in tensors.values() for part in t.parts}
    for name in entries:
        if name not in known:
            raise CodingError(f"{name} is stored, but not listed")


def _dense_header(
    document: Any, file: str, tensors: Mapping[str, SparseTensor]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The dense shard's header and its entries, which must be the listed tensors without holes between them."""
    if not isinstance(document["dense_header"], str):
        raise CodingError("its dense_header is no text")
    header = document["dense_header"].encode("utf-8")
    if f"{zlib.crc32(header):08x}" != document["dense_header_crc32"]:
        raise CodingError("its dense_header does not have the checksum that goes with it")
    fields = strict_json(header)
    if not isinstance(fields, dict):
        raise CodingError("its dense_header is no JSON object")
    entries = [header_entry(name, file, value, 8 + len(header)) for name, value in fields.items() if name != METADATA]
    position = 8 + len(header)
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        tensor = tensors.get(entry.name)
        if tensor is None or (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape) or entry.begin != position:
            raise CodingError(f"{entry.name} is another tensor in its dense_header")
        position = entry.end
    if len(entries) != len(tensors):
        raise CodingError("its dense_header does not have all of its tensors")
    return header, {entry.name: entry for entry in entries}
