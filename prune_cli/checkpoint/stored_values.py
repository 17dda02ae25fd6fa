"""The one way from new values to the dtype of a checkpoint: what is written is finite."""

from __future__ import annotations

import math

import torch

from prune_cli.errors import PruneError


def to_stored(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` as `dtype`, in which the tensor `name` is stored.

    Raises PruneError naming the tensor where a value is not finite there: beyond the range of `dtype`, or before.
    """
    stored = values.to(dtype)
    # A sum shows NaN and Inf for a fraction of the cost; only one that is not finite needs the closer look.
    if math.isfinite(stored.sum(dtype=torch.float64 if dtype == torch.float64 else torch.float32)):
        return stored
    if bool(torch.isfinite(stored).all()):
        return stored
    if not bool(torch.isfinite(values).all()):
        raise PruneError(
            f"The new weights of {name} are not finite: its inputs tell too little; use more calibration text, or more "
            "damping where the method has it (-o damping=0.1)."
        )
    kind = str(dtype).removeprefix("torch.")
    raise PruneError(
        f"The new weights of {name} are as large as {float(values.abs().max()):.4g}, beyond the "
        f"{torch.finfo(dtype).max:.4g} of {kind}, in which it is stored: use more calibration text or more damping "
        "(-o damping=0.1), or convert the checkpoint to float32 first."
    )
