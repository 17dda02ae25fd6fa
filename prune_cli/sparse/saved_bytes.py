"""What tensors would take in a sparse file, from how many zeros they have; nothing is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.sparse.coding import BITMASK, mask_bytes
from prune_cli.sparse.format import item_bytes, may_be_encoded
from prune_cli.sparse.groups import LARGEST_GROUP

if TYPE_CHECKING:
    from methods._pattern import NofM


def saved_bytes(entry: TensorEntry, zeros: int | None, pattern: NofM | None = None) -> int:
    """How much smaller `entry` becomes; `pattern` is what its rows keep. -0.0 among the zeros is not seen."""
    size = item_bytes(entry.dtype)
    if not zeros or size is None or not may_be_encoded(entry.dtype, entry.shape):
        return 0
    takes = (entry.count - zeros) * size + mask_bytes(BITMASK, entry.count)
    if pattern is not None and pattern.of <= LARGEST_GROUP and entry.shape[-1] % pattern.of == 0:
        kept = entry.count // pattern.of * pattern.keep
        takes = min(takes, kept * size + mask_bytes(str(pattern), entry.count))
    return max(0, entry.nbytes - takes)
