"""One stream of random numbers per tensor."""

from __future__ import annotations

import hashlib


def seed_of(name: str, seed: int) -> int:
    """One stream of random numbers per tensor, whatever the order of the tensors."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
