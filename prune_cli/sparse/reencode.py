"""The shards of an output that is being made become sparse where they lie, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.errors import RequestError
from prune_cli.progress import Progress, Silent
from prune_cli.sparse.config import check_self_contained, with_entry
from prune_cli.sparse.encode_shard import Written, make_dense, make_sparse
from prune_cli.sparse.format import is_reserved, is_sparse, open_shard
from prune_cli.sparse.parallel_files import each_file

# What a kill leaves of such files the next run writes anew.
_BESIDE = ".recoded"
_CONFIG = "config.json"


def sparse_config(source: Checkpoint, folder: Path, text: str | None, *, self_contained: bool) -> str:
    """config.json of the sparse output, from its `text` where that is not the input's in `folder`.

    Raises RequestError for a checkpoint that cannot be stored sparse.
    """
    for name in source.entries:
        if is_reserved(name):
            raise RequestError(
                f"{name} has a name that sparse safetensors keeps for its own parts: use --format dense."
            )
    if self_contained:
        check_self_contained(folder)
    path = folder / _CONFIG
    return with_entry(text or path.read_text(encoding="utf-8"), path, self_contained=self_contained)


def encode_shards(folder: Path, files: Sequence[str], progress: Progress) -> int:
    """Replace each dense shard by its sparse form; returns the bytes of all. Stopped anywhere, every shard is whole."""
    return sum(written.nbytes for _, written in each_file(files, partial(_encode, folder), progress))


def decode_shards(folder: Path, files: Sequence[str]) -> None:
    """The inverse, for a run that was stopped while it encoded: shards that are dense still stay as they are."""
    sparse = [file for file in files if is_sparse(folder / file)]
    for _ in each_file(sparse, partial(_decode, folder), Silent()):
        pass


def _encode(folder: Path, file: str, pool: Executor, done: Callable[[], None]) -> Written:
    written = make_sparse(folder / file, folder / (file + _BESIDE), pool, done)
    (folder / (file + _BESIDE)).replace(folder / file)
    return written


def _decode(folder: Path, file: str, pool: Executor, done: Callable[[], None]) -> Written:
    written = make_dense(open_shard(folder / file), folder / (file + _BESIDE), pool, done)
    (folder / (file + _BESIDE)).replace(folder / file)
    return written
