"""One safetensors file to its sparse form and back: streaming, the tensors of a file in parallel."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prune_cli.checkpoint.dtypes import BITS, data_bytes
from prune_cli.checkpoint.reader import METADATA, TensorEntry, file_metadata, header_bytes, read_header
from prune_cli.errors import PruneError, RequestError
from prune_cli.sparse.coding import DENSE, Plan, encode, plan
from prune_cli.sparse.decode_shard import decoded, elements, mapped, split
from prune_cli.sparse.deflate import DEFLATED, deflated, split_values
from prune_cli.sparse.format import (
    HIGH_SUFFIX,
    MASK_SUFFIX,
    METADATA_KEY,
    SparseShard,
    SparseTensor,
    describe,
    is_reserved,
    may_be_encoded,
)
from prune_cli.sparse.scratch_file import Spool
from prune_cli.sparse.zlib_backend import zlib

_ALIGNMENT = 8
# Dense bytes of finished tensors after which they are sent to the disk, while others are still worked on.
_SYNC_BYTES = 1 << 25
# Of the high bytes that their stream may take: else inflating would cost more than it saves.
_LARGEST_SHARE = 7 / 8


@dataclass(frozen=True)
class Written:
    """What one file became: its size, how many tensors it has, and how many are encoded in its sparse form."""

    nbytes: int
    tensors: int
    encoded: int


def make_sparse(
    source: Path, target: Path, pool: Executor, done: Callable[[], None], *, compress: bool = False
) -> Written:
    """Write the sparse form of the dense shard `source`, with `compress` of deflated values.

    First every tensor is looked at, then every one is written.
    """
    entries = list(read_header(source.parent, source.name))
    header = header_bytes(source)[0]
    metadata = file_metadata(source) or {}
    if METADATA_KEY in metadata:
        raise RequestError(f"{source} is sparse already: convert works on one with --format dense.")
    for entry in entries:
        if is_reserved(entry.name):
            raise RequestError(f"{entry.name} in {source} has a name that sparse safetensors keeps for its own parts.")
    data = mapped(source)
    with Spool(target.parent) as spool:
        looked_at = pool.map(lambda entry: _look_at(data, entry, spool if compress else None), _largest_first(entries))
        tensors = {t.name: t for t in _place(looked_at, entries, target.name)}
        text = _header(tensors.values(), metadata, header)
        tensors = {name: _moved(t, 8 + len(text)) for name, t in tensors.items()}
        end = max([8 + len(text), *(part.end for t in tensors.values() for part in t.parts)])

        def write(entry: TensorEntry) -> None:
            _write_sparse(data, entry, tensors[entry.name], spool, file.write)

        with _file(target, end) as file:
            file.write(0, len(text).to_bytes(8, "little") + text)
            _for_each(entries, write, pool, file, done)
    return _written(end, tensors.values())


def make_dense(shard: SparseShard, target: Path, pool: Executor, done: Callable[[], None]) -> Written:
    """Write the dense shard that `shard` was made from. Raises PruneError, naming the tensor, for what is damaged."""
    end = max([8 + len(shard.dense_header), *(entry.end for entry in shard.dense_entries.values())])
    data = mapped(shard.path)
    with _file(target, end) as file:
        file.write(0, len(shard.dense_header).to_bytes(8, "little") + shard.dense_header)

        def restore(entry: TensorEntry) -> None:
            position = entry.begin
            for piece in decoded(shard, shard.tensors[entry.name], data):
                file.write(position, piece)
                position += piece.nbytes

        _for_each(list(shard.dense_entries.values()), restore, pool, file, done)
    return _written(end, shard.tensors.values())


def _written(nbytes: int, tensors: Collection[SparseTensor]) -> Written:
    return Written(nbytes, len(tensors), sum(not t.is_as_dense for t in tensors))


def _look_at(data: np.ndarray, entry: TensorEntry, spool: Spool | None) -> SparseTensor:
    """Choose the encoding; the places are not known yet, but the sizes are."""
    bits = elements(data, entry)
    encodable = may_be_encoded(entry.dtype, entry.shape)
    chosen = plan(bits, entry.shape[-1]) if encodable else Plan(DENSE, entry.count, 0)
    checksum = 0
    for piece in split(bits):
        checksum = zlib.crc32(piece.data, checksum)
    high = None
    if spool is not None and encodable and entry.dtype in DEFLATED:
        high = _deflate(entry, bits, chosen, spool)

    def part(suffix: str, dtype: str, count: int) -> TensorEntry:
        return TensorEntry(entry.name + suffix, entry.file, dtype, (count,), 0, data_bytes(dtype, count))

    values = entry if chosen.encoding == DENSE else part("", entry.dtype, chosen.values)
    if high is not None:
        values = part("", "U8", chosen.values * (bits.dtype.itemsize - 1))
    mask = None if chosen.encoding == DENSE else part(MASK_SUFFIX, "U8", chosen.mask_bytes)
    return SparseTensor(entry.name, entry.dtype, entry.shape, chosen.encoding, checksum, values, mask, high)


def _deflate(entry: TensorEntry, bits: np.ndarray, chosen: Plan, spool: Spool) -> TensorEntry | None:
    """Leave the deflated high bytes in the spool, which the tensor's name finds; None where they gain too little."""
    stream = deflated(split_values(values)[0] for values, _ in _pieces(bits, chosen.encoding))
    if len(stream) > _LARGEST_SHARE * chosen.values:
        return None
    spool.add(entry.name, stream)
    return TensorEntry(entry.name + HIGH_SUFFIX, entry.file, "U8", (len(stream),), 0, len(stream))


def _pieces(bits: np.ndarray, encoding: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(values, bytes of the mask), for every encoding."""
    if encoding == DENSE:
        return ((piece, piece[:0].view(np.uint8)) for piece in split(bits))
    return encode(bits, encoding)


def _place(tensors: Iterable[SparseTensor], order: Sequence[TensorEntry], file: str) -> Iterator[SparseTensor]:
    """Give every part its bytes after the header: wide elements first, so that each lies where readers can map it."""
    found = {t.name: t for t in tensors}
    parts = [part for entry in order for part in found[entry.name].parts]
    places: dict[str, TensorEntry] = {}
    position = 0
    for part in sorted(parts, key=lambda part: (-BITS[part.dtype], is_reserved(part.name))):
        places[part.name] = replace(part, file=file, begin=position, end=position + part.nbytes)
        position += part.nbytes
    for entry in order:
        yield _with_parts(found[entry.name], lambda part: places[part.name])


def _with_parts(tensor: SparseTensor, place: Callable[[TensorEntry], TensorEntry]) -> SparseTensor:
    mask, high = (None if part is None else place(part) for part in (tensor.mask, tensor.high))
    return replace(tensor, values=place(tensor.values), mask=mask, high=high)


def _moved(tensor: SparseTensor, by: int) -> SparseTensor:
    """Offsets after the header become positions in the file."""
    return _with_parts(tensor, lambda part: replace(part, begin=part.begin + by, end=part.end + by))


def _header(tensors: Iterable[SparseTensor], metadata: Any, dense_header: bytes) -> bytes:
    listed = {t.name: t for t in tensors}
    header: dict[str, Any] = {METADATA: {**metadata, METADATA_KEY: describe(listed, dense_header)}}
    for part in sorted((part for t in listed.values() for part in t.parts), key=lambda part: part.begin):
        header[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [part.begin, part.end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _write_sparse(data: np.ndarray, entry: TensorEntry, tensor: SparseTensor, spool: Spool, write: Write) -> None:
    position = tensor.values.begin
    mask_position = 0 if tensor.mask is None else tensor.mask.begin
    for values, mask in _pieces(elements(data, entry), tensor.encoding):
        stored = values if tensor.high is None else split_values(values)[1]
        write(position, stored)
        write(mask_position, mask)
        position, mask_position = position + stored.nbytes, mask_position + mask.nbytes
    mask_end = 0 if tensor.mask is None else tensor.mask.end
    if (position, mask_position) != (tensor.values.end, mask_end):
        raise PruneError(f"{entry.name} changed while it was converted: run it again.")
    if tensor.high is not None:
        for begin, piece in spool.pieces(entry.name):
            write(tensor.high.begin + begin, piece)


def _largest_first(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """The order in which threads end at about the same time."""
    return sorted(entries, key=lambda entry: -entry.nbytes)


Write = Callable[[int, Any], None]


def _for_each(
    entries: Sequence[TensorEntry],
    work: Callable[[TensorEntry], None],
    pool: Executor,
    file: _File,
    done: Callable[[], None],
) -> None:
    """Write all tensors in the pool's threads, while this one sends to the disk what is there already."""
    jobs = {pool.submit(work, entry): entry.nbytes for entry in _largest_first(entries)}
    try:
        waiting = 0
        for job in as_completed(jobs):
            job.result()
            done()
            waiting += jobs[job]
            if waiting >= _SYNC_BYTES:
                file.sync()
                waiting = 0
    finally:
        # After an error none may be left that writes to the file, which is closed then.
        for job in jobs:
            job.cancel()
        wait(jobs)


@dataclass(frozen=True)
class _File:
    descriptor: int

    def write(self, position: int, data: Any) -> None:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while view:
            written = os.pwrite(self.descriptor, view, position)
            view, position = view[written:], position + written

    def sync(self) -> None:
        os.fdatasync(self.descriptor)


@contextmanager
def _file(path: Path, size: int) -> Iterator[_File]:
    """A new file of `size` bytes, to be written at any place. It is on the disk when the context ends."""
    file = _File(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644))
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.descriptor, 0, size)
        else:
            os.truncate(file.descriptor, size)
        yield file
        file.sync()
    finally:
        os.close(file.descriptor)
