"""Text that was tokenised before: a .safetensors file whose rows are used as they are, padding left out."""

from __future__ import annotations

from pathlib import Path

import torch

from calibration.batch import Batch
from calibration.errors import CalibrationError
from calibration.token_set import TokenRequest, TokenSet, sha256_of

_AS_STORED = "tokens as stored, one row a sample"
_PADDED = f"{_AS_STORED}, without its padding (attention_mask 0), so that longer ones count more"


def stored_windows(want: TokenRequest) -> TokenSet:
    """The rows of `input_ids` (samples, length), the first `samples` of them if given, with their `attention_mask`.

    Raises CalibrationError for a file without such tensors, and for a `samples` or `seq_len` that it does not have.
    """
    path = want.source.files[0]
    stored = _read(path)
    if want.seq_len is not None and want.seq_len != stored.length:
        raise CalibrationError(
            f"{path} holds samples of {stored.length} tokens, which are used as they are: "
            f"leave out --seq-len {want.seq_len}."
        )
    if want.samples is not None and want.samples > len(stored):
        raise CalibrationError(
            f"{path} holds {len(stored)} samples, but --samples asks for {want.samples}: ask for {len(stored)} at most."
        )
    chosen = stored[slice(want.samples)]
    return TokenSet(
        chosen.ids.contiguous(),
        want.source.given,
        _AS_STORED if chosen.mask is None else _PADDED,
        None,
        sha256_of(chosen),
        stored.tokens,
        (),
        chosen.mask,
    )


def _read(path: Path) -> Batch:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            names = list(stored.keys())
            ids, mask = (stored.get_tensor(name) if name in names else None for name in ("input_ids", "attention_mask"))
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
    ids = ids.to(torch.int64)
    return Batch(ids) if mask is None else _padded(path, ids, mask)


def _padded(path: Path, ids: torch.Tensor, mask: torch.Tensor) -> Batch:
    """Padding moved behind the tokens, where they keep the positions that they have without it, and its ids made 0."""
    where = f"attention_mask in {path}"
    if mask.shape != ids.shape:
        raise CalibrationError(
            f"{where} is {list(mask.shape)}, but input_ids is {list(ids.shape)}: save both of one shape."
        )
    real = mask == 1
    if not bool((real | (mask == 0)).all()):
        raise CalibrationError(f"{where} holds other numbers than 0 and 1: save 1 for tokens and 0 for padding.")
    counts = real.sum(1)
    if (row := _first(counts < min(2, ids.shape[1]))) is not None:
        raise CalibrationError(
            f"{where} has {int(counts[row])} ones in row {row} (counted from 0), too few to predict a token from "
            "another: leave the row out."
        )
    if (row := _first((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1)) is not None:
        raise CalibrationError(
            f"{where} has zeros between the tokens of row {row} (counted from 0), but padding stands before or behind "
            "them: save one text a row."
        )
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    ids, real = ids.gather(1, order), real.gather(1, order)
    return Batch(ids.masked_fill(~real, 0), None if bool(real.all()) else real)


def _first(rows: torch.Tensor) -> int | None:
    """The first row, counted from 0, for which it is true."""
    found = rows.nonzero()
    return int(found[0]) if len(found) else None
