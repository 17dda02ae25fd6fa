"""What torchrun and accelerate launch tell a process about the others; no torch, so that it can be asked at once."""

from __future__ import annotations

import os

SILENCE_SECONDS = 300.0


def process_count() -> int:
    """Of the run that this process belongs to."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process tells what all would tell."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
