"""A checkpoint folder for reading, however its weights are stored: plain, sparse, or as low-bit codes with scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_cli.checkpoint.bitmask_format import bitmask_format
from prune_cli.checkpoint.reader import Checkpoint, strict_json
from prune_cli.sparse import dense_view
from prune_cli.sparse.format import QUANT_METHOD as SPARSE

# Ways of this package to store a model whose weights are plain numbers all the same.
_OURS = frozenset({SPARSE, "prune-cli-sizes"})


def open_checkpoint(folder: Path) -> Checkpoint:
    """The values of a checkpoint, decoded when they are read. Raises RequestError for what is not sound, by name."""
    checkpoint = dense_view.open_checkpoint(folder)
    return checkpoint if isinstance(checkpoint, dense_view.Decoded) else dequantised(checkpoint)


def open_to_look(folder: Path) -> Checkpoint:
    """As `open_checkpoint`, and of formats that have to be converted before anything is done with them."""
    form = bitmask_format(_config(folder))
    if form is None:
        return open_checkpoint(folder)
    from prune_cli.sparse.bitmask_view import BitmaskView

    return BitmaskView(Checkpoint.open(folder), form)


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` by the values of its packed weights, itself where it has none. Raises RequestError as above."""
    # With torch, which a name that is wrong need not wait for.
    from prune_cli.packed.dequantised import Dequantised
    from prune_cli.packed.detect import find_packed, quantisation

    config = _config(checkpoint.folder)
    method = (quantisation(config) or {}).get("quant_method")
    if method in _OURS:
        return checkpoint
    weights = find_packed(checkpoint, config)
    return Dequantised(checkpoint, weights) if weights else checkpoint


def _config(folder: Path) -> dict[str, Any]:
    """config.json as far as it can be read: whether it is sound is for those to tell who need it."""
    try:
        config = strict_json((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
