"""Makes the weights of compressed-tensors' sparse-bitmask and sparse-24-bitmask dense, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from prune_cli.checkpoint.bitmask_format import KEYS, PARTS
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.errors import PruneError, RequestError
from prune_cli.sparse.encode_shard import Written


def check_bitmasks(checkpoint: Checkpoint) -> None:
    """Raise RequestError where config.json speaks of masks and a weight lacks one of its parts, or none has any."""
    modules = masked_modules(checkpoint)
    if not modules:
        raise RequestError(
            f"{checkpoint.folder}/config.json says that zeros are left out of the weights, but no tensor has a mask: "
            "the weights and the config do not belong together."
        )
    for module in modules:
        for part in PARTS[:3]:
            if f"{module}.{part}" not in checkpoint.entries:
                raise RequestError(f"{module}.weight lacks its {module}.{part}: download the checkpoint again.")


def dense_bytes(checkpoint: Checkpoint) -> int:
    """At most, of the dense files: every bit of a mask is a weight."""
    masks = [checkpoint.entries[f"{module}.bitmask"] for module in masked_modules(checkpoint)]
    widest = max(entry.nbytes // max(1, entry.count) for entry in checkpoint.entries.values())
    return checkpoint.nbytes + sum(8 * mask.count * widest for mask in masks)


def write_dense(checkpoint: Checkpoint, file: str, target: Path, advance: Callable[[], None]) -> Written:
    """The shard `file` with whole weights, each where its values lay. Raises PruneError for parts that do not fit."""
    modules, tensors, decoded = masked_modules(checkpoint), {}, 0
    of_modules = {f"{module}.{part}": (module, part) for module in modules for part in PARTS}
    for name, entry in checkpoint.entries.items():
        if entry.file != file:
            continue
        module, part = of_modules.get(name, (None, None))
        if module is None:
            tensors[name] = checkpoint.read(name)
        elif part == "compressed":
            tensors[f"{module}.weight"] = bitmask_weight(checkpoint, module)
            decoded += 1
        advance()
    save_file(tensors, target, metadata={"format": "pt"})
    return Written(target.stat().st_size, len(tensors), decoded)


def without_bitmask(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the dense model."""
    return {
        key: without_bitmask(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in KEYS
    }


def masked_modules(checkpoint: Checkpoint) -> list[str]:
    """The modules whose weights are stored so."""
    return [name.removesuffix(".bitmask") for name in checkpoint.entries if name.endswith(".bitmask")]


def bitmask_size(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """(rows, columns) of the weight of `module`. Raises PruneError where its mask is none of such a weight."""
    mask, shape = checkpoint.entries[f"{module}.bitmask"], checkpoint.read(f"{module}.shape")
    size = [int(each) for each in shape.flatten()]
    if len(size) != 2 or min(size) < 0 or mask.dtype != "U8" or list(mask.shape) != [size[0], -(-size[1] // 8)]:
        raise PruneError(
            f"{module}.bitmask has the shape {list(mask.shape)}, which is no mask of a weight {size}: "
            "download the checkpoint again."
        )
    return size[0], size[1]


def bitmask_weight(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    """The dense weight of `module`. Raises PruneError for parts that do not fit."""
    size = bitmask_size(checkpoint, module)
    values, mask = (checkpoint.read(f"{module}.{part}") for part in PARTS[:2])
    kept = torch.from_numpy(np.unpackbits(mask.numpy(), axis=-1, count=size[1], bitorder="little")).bool()
    if int(kept.sum()) != values.numel():
        raise PruneError(
            f"{module}.compressed has {values.numel()} values, but {module}.bitmask has places for {int(kept.sum())}: "
            "download the checkpoint again."
        )
    # torch selects no entries of float8.
    numbers = values.flatten().view(torch.uint8) if values.element_size() == 1 else values.flatten()
    dense = torch.zeros(size, dtype=numbers.dtype)
    dense[kept] = numbers
    return dense.view(values.dtype)
