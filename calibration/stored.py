"""Text that was tokenised before: a .safetensors file whose rows are used as they are."""

from __future__ import annotations

from pathlib import Path

import torch

from calibration.errors import CalibrationError
from calibration.token_set import TokenRequest, TokenSet, token_set


def stored_windows(want: TokenRequest) -> TokenSet:
    """The rows of `input_ids` (samples, length), the first `samples` of them if given.

    Raises CalibrationError for a file without such a tensor, and for a `samples` or `seq_len` that it does not have.
    """
    path = want.source.files[0]
    ids = _read_ids(path)
    if want.seq_len is not None and want.seq_len != ids.shape[1]:
        raise CalibrationError(
            f"{path} holds samples of {ids.shape[1]} tokens, which are used as they are: "
            f"leave out --seq-len {want.seq_len}."
        )
    if want.samples is not None and want.samples > len(ids):
        raise CalibrationError(
            f"{path} holds {len(ids)} samples, but --samples asks for {want.samples}: ask for {len(ids)} at most."
        )
    chosen = ids[: want.samples].contiguous()
    return token_set(want.source, chosen, "tokens as stored, one row a sample", ids.numel(), seed=None)


def _read_ids(path: Path) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            names = list(stored.keys())
            ids = stored.get_tensor("input_ids") if "input_ids" in names else None
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is no readable safetensors file ({error}): save it again.") from error
    if ids is None:
        raise CalibrationError(
            f"{path} has no tensor input_ids, but {', '.join(names) or 'no tensor at all'}: rename the one that holds "
            "the token ids."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 2 or 0 in ids.shape:
        raise CalibrationError(
            f"input_ids in {path} is {list(ids.shape)} of {str(ids.dtype).removeprefix('torch.')}: "
            "save integers of shape (samples, length)."
        )
    return ids.to(torch.int64)
