"""What tensors would take in a sparse file, from how many zeros they have; nothing is read."""

from __future__ import annotations

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.sparse.coding import BITMASK, mask_bytes
from prune_cli.sparse.format import item_bytes, may_be_encoded
from prune_cli.sparse.groups import LARGEST_GROUP


def saved_bytes(entry: TensorEntry, zeros: int | None, pattern: str | None = None) -> int:
    """How much smaller `entry` becomes; `pattern` (as 2:4) is what its rows keep. -0.0 among the zeros is not seen."""
    size = item_bytes(entry.dtype)
    if not zeros or size is None or not may_be_encoded(entry.dtype, entry.shape):
        return 0
    takes = (entry.count - zeros) * size + mask_bytes(BITMASK, entry.count)
    if pattern is not None and ":" in pattern:
        keep, of = map(int, pattern.split(":"))
        if of <= LARGEST_GROUP and entry.shape[-1] % of == 0:
            takes = min(takes, entry.count // of * keep * size + mask_bytes(pattern, entry.count))
    return max(0, entry.nbytes - takes)
