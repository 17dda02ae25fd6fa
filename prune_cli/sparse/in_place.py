"""The shards of an output that is being made become sparse where they lie, one after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prune_cli.checkpoint import Checkpoint
from prune_cli.errors import RequestError
from prune_cli.progress import Progress
from prune_cli.sparse.config import with_entry
from prune_cli.sparse.format import MASK_SUFFIX, is_sparse, open_shard
from prune_cli.sparse.shards import make_dense, make_sparse

# A kill leaves at most one such file, which the next run writes anew.
_BESIDE = ".recoded"
_MOST_THREADS = 8
_CONFIG = "config.json"


def sparse_config(source: Checkpoint) -> str:
    """config.json of the sparse output. Raises RequestError for a checkpoint that cannot be stored sparse."""
    for name in source.entries:
        if name.endswith(MASK_SUFFIX):
            raise RequestError(f"{name} has a name that sparse safetensors keeps for masks: use --format dense.")
    path = source.folder / _CONFIG
    return with_entry(path.read_text(encoding="utf-8"), path)


def encode_shards(folder: Path, files: Sequence[str], progress: Progress) -> int:
    """Replace each dense shard by its sparse form; returns the bytes of all. Stopped anywhere, every shard is whole."""
    nbytes = 0
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        for file in files:
            nbytes += make_sparse(folder / file, folder / (file + _BESIDE), pool, progress.advance).nbytes
            (folder / (file + _BESIDE)).replace(folder / file)
    return nbytes


def decode_shards(folder: Path, files: Sequence[str]) -> None:
    """The inverse, for a run that was stopped while it encoded: shards that are dense still stay as they are."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        for file in files:
            if is_sparse(folder / file):
                make_dense(open_shard(folder / file), folder / (file + _BESIDE), pool, lambda: None)
                (folder / (file + _BESIDE)).replace(folder / file)
