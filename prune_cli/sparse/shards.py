"""One safetensors file to its sparse form and back: streaming, the tensors of a file in parallel."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prune_cli.checkpoint import BITS, METADATA, TensorEntry, file_metadata, header_bytes, read_header
from prune_cli.errors import PruneError, RequestError
from prune_cli.sparse.coding import DENSE, Plan, encode, plan
from prune_cli.sparse.format import (
    MASK_SUFFIX,
    METADATA_KEY,
    SparseShard,
    SparseTensor,
    describe,
    may_be_encoded,
)
from prune_cli.sparse.reading import decoded, elements, mapped, split

_ALIGNMENT = 8
# Dense bytes of finished tensors after which they are sent to the disk, while others are still worked on.
_SYNC_BYTES = 1 << 25


@dataclass(frozen=True)
class Written:
    """What one file became: its size, how many tensors it has, and how many are encoded in its sparse form."""

    nbytes: int
    tensors: int
    encoded: int


def make_sparse(source: Path, target: Path, pool: Executor, done: Callable[[], None]) -> Written:
    """Write the sparse form of the dense shard `source`. First every tensor is looked at, then every one is written."""
    entries = list(read_header(source.parent, source.name))
    header = header_bytes(source)[0]
    metadata = file_metadata(source) or {}
    if METADATA_KEY in metadata:
        raise RequestError(f"{source} is sparse already: convert works on one with --format dense.")
    for entry in entries:
        if entry.name.endswith(MASK_SUFFIX):
            raise RequestError(f"{entry.name} in {source} has a name that sparse safetensors keeps for masks.")
    data = mapped(source)
    looked_at = pool.map(lambda entry: _look_at(data, entry), _largest_first(entries))
    tensors = {t.name: t for t in _place(looked_at, entries, target.name)}
    text = _header(tensors.values(), metadata, header)
    tensors = {name: _moved(t, 8 + len(text)) for name, t in tensors.items()}
    end = max([8 + len(text), *(part.end for t in tensors.values() for part in _parts(t))])
    with _file(target, end) as file:
        file.write(0, len(text).to_bytes(8, "little") + text)
        _for_each(entries, lambda entry: _write_sparse(data, entry, tensors[entry.name], file.write), pool, file, done)
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
    return Written(nbytes, len(tensors), sum(t.encoding != DENSE for t in tensors))


def _look_at(data: np.ndarray, entry: TensorEntry) -> SparseTensor:
    """Choose the encoding; the places are not known yet, but the sizes are."""
    bits = elements(data, entry)
    encodable = may_be_encoded(entry.dtype, entry.shape)
    chosen = plan(bits, entry.shape[-1]) if encodable else Plan(DENSE, entry.count, 0)
    checksum = 0
    for piece in split(bits):
        checksum = zlib.crc32(piece.data, checksum)
    values = entry if chosen.encoding == DENSE else replace(
        entry, shape=(chosen.values,), begin=0, end=chosen.values * BITS[entry.dtype] // 8
    )  # fmt: skip
    mask = None
    if chosen.encoding != DENSE:
        mask = TensorEntry(entry.name + MASK_SUFFIX, entry.file, "U8", (chosen.mask_bytes,), 0, chosen.mask_bytes)
    return SparseTensor(entry.name, entry.dtype, entry.shape, chosen.encoding, checksum, values, mask)


def _place(tensors: Iterable[SparseTensor], order: Sequence[TensorEntry], file: str) -> Iterator[SparseTensor]:
    """Give every part its bytes after the header: wide elements first, so that each lies where readers can map it."""
    found = {t.name: t for t in tensors}
    parts = [part for entry in order for part in _parts(found[entry.name])]
    places: dict[str, TensorEntry] = {}
    position = 0
    for part in sorted(parts, key=lambda part: (-BITS[part.dtype], part.name.endswith(MASK_SUFFIX))):
        places[part.name] = replace(part, file=file, begin=position, end=position + part.nbytes)
        position += part.nbytes
    for entry in order:
        t = found[entry.name]
        yield replace(t, values=places[t.name], mask=None if t.mask is None else places[t.mask.name])


def _parts(tensor: SparseTensor) -> list[TensorEntry]:
    return [tensor.values] if tensor.mask is None else [tensor.values, tensor.mask]


def _moved(tensor: SparseTensor, by: int) -> SparseTensor:
    """Offsets after the header become positions in the file."""
    values, mask = tensor.values, tensor.mask
    return replace(
        tensor,
        values=replace(values, begin=values.begin + by, end=values.end + by),
        mask=None if mask is None else replace(mask, begin=mask.begin + by, end=mask.end + by),
    )


def _header(tensors: Iterable[SparseTensor], metadata: Any, dense_header: bytes) -> bytes:
    listed = {t.name: t for t in tensors}
    header: dict[str, Any] = {METADATA: {**metadata, METADATA_KEY: describe(listed, dense_header)}}
    for part in sorted((part for t in listed.values() for part in _parts(t)), key=lambda part: part.begin):
        header[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [part.begin, part.end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _write_sparse(data: np.ndarray, entry: TensorEntry, tensor: SparseTensor, write: Write) -> None:
    bits, position = elements(data, entry), tensor.values.begin
    if tensor.mask is None:
        for piece in split(bits):
            write(position, piece)
            position += piece.nbytes
        return
    mask_position = tensor.mask.begin
    for values, mask in encode(bits, tensor.encoding):
        write(position, values)
        write(mask_position, mask)
        position, mask_position = position + values.nbytes, mask_position + mask.nbytes
    if (position, mask_position) != (tensor.values.end, tensor.mask.end):
        raise PruneError(f"{entry.name} changed while it was converted: run it again.")


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
