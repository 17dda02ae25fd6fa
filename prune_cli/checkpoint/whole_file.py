"""A safetensors file of our own that is there as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

# What `save_whole` raises where a disk is full, or a folder may not be written.
NOT_WRITTEN = (OSError, SafetensorError)


def save_whole(path: Path, tensors: Mapping[str, torch.Tensor], key: str, head: Mapping[str, Any]) -> None:
    """Write `tensors`, and `head` as JSON under `key`, to `path` in one rename; what was there stays till then.

    Raises one of NOT_WRITTEN, and leaves nothing half written.
    """
    beside = path.with_suffix(f".partial{path.suffix}")
    try:
        save_file({name: each.contiguous() for name, each in tensors.items()}, beside, {key: json.dumps(head)})
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.rename(path)
    except NOT_WRITTEN:
        beside.unlink(missing_ok=True)
        raise
