"""Makes single sparse shards, and sparse checkpoints, for the tests of the format."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from prune_cli.sparse.convert import ConvertRequest, convert
from prune_cli.sparse.encode_shard import make_sparse


def dense_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(tensors), path, metadata={"format": "pt", "other": "kept"})
    return path


def sparse_file(dense: Path, path: Path, *, compress: bool = False) -> Path:
    """The sparse form of one dense file."""
    with ThreadPoolExecutor(2) as pool:
        make_sparse(dense, path, pool, lambda: None, compress=compress)
    return path


def zeroed(folder: Path, share: float = 0.6, pattern: tuple[int, int] | None = None) -> Path:
    """Put zeros into every matrix of a checkpoint, at random or N of every M along its rows; returns `folder`."""
    generator = torch.Generator().manual_seed(0)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.ndim < 2:
                continue
            places = torch.rand(tensor.shape, generator=generator)
            if pattern is None:
                tensors[name] = torch.where(places < share, 0, tensor)
            else:
                groups = places.reshape(-1, pattern[1])
                kept = groups.argsort(1).argsort(1) < pattern[0]
                tensors[name] = torch.where(kept.reshape(tensor.shape), tensor, 0)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def sparse_copy(model: Path, out: Path, *, compress: bool = False) -> Path:
    convert(ConvertRequest(str(model), out, "sparse", compress=compress))
    return out
