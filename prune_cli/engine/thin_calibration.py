"""A warning where the calibration text is too short for what is made of it."""

from __future__ import annotations

from collections.abc import Iterable

from prune_cli.model.orientation import matrix_shape
from prune_cli.model.tensor_map import TensorInfo

# 16 windows of 2048; the papers take 128.
_USUAL = 1 << 15


def thin_calibration(tokens: int, infos: Iterable[TensorInfo], *, gram: bool) -> list[str]:
    """One warning, or none; `infos` are the linear layers that `tokens` are for, with `gram` by least squares."""
    widest = max((matrix_shape(info)[1] for info in infos), default=0)
    if gram and tokens < widest:
        return [
            f"Calibration has {tokens:,} tokens, fewer than the {widest:,} inputs of the widest linear layer: what is "
            "solved for follows these few too closely; give more --samples or a longer --seq-len."
        ]
    if tokens < _USUAL:
        return [
            f"Calibration has {tokens:,} tokens, and {_USUAL:,} or more are usual: another text may give quite another "
            "result; give more --samples or a longer --seq-len."
        ]
    return []
