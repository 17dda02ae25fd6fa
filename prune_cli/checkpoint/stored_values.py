"""Values of a checkpoint are finite: as they are read, and in its dtype as they are written."""

from __future__ import annotations

import math

import torch

from prune_cli.errors import PruneError


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which stored floats of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def broken(values: torch.Tensor) -> str:
    """ "NaN" or "infinite values" where floats hold some, else empty."""
    # A sum shows them for a fraction of the cost; only one that is not finite needs the closer look.
    if math.isfinite(values.sum(dtype=sum_dtype(values.dtype))) or bool(torch.isfinite(values).all()):
        return ""
    return "NaN" if bool(torch.isnan(values).any()) else "infinite values"


def to_stored(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` as `dtype`, in which the tensor `name` is stored.

    Raises PruneError naming the tensor where a value is not finite there: beyond the range of `dtype`, or before.
    """
    stored = values.to(dtype)
    if not broken(stored):
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
