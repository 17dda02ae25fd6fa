"""Checkpoints of compressed-tensors up to 0.9 whose zeros are left out; today's releases load them with random weights.

In place of `X.weight` lie `X.compressed`, the values that are no zeros, row by row, and of 2:4 two of every four;
`X.bitmask` (rows, columns / 8), the lowest bit first; `X.shape`; and mostly `X.row_offsets`, which follow from these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = ("compressed", "bitmask", "shape", "row_offsets")
KEYS = ("quantization_config", "compression_config")
_FORMATS = ("sparse-bitmask", "sparse-24-bitmask")


def bitmask_format(config: Mapping[str, Any]) -> str | None:
    """The one of these formats that `config`, a config.json, names."""
    for where in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for entry in (where.get(key) for key in KEYS):
            sparsity = entry.get("sparsity_config") if isinstance(entry, Mapping) else None
            named = sparsity.get("format") if isinstance(sparsity, Mapping) else None
            if named in _FORMATS:
                return str(named)
    return None


def with_quantised(config: Mapping[str, Any]) -> bool:
    """Whether the values that are left are also quantised."""
    entries = (config.get(key) for key in KEYS)
    return any(isinstance(entry, Mapping) and bool(entry.get("config_groups")) for entry in entries)
