"""Samples that were prepared before: .safetensors whose rows of tokens are used as they are, padding left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import pad

from calibration.batch import Batch
from calibration.errors import CalibrationError
from calibration.stored_shape import check_stored
from calibration.token_set import TokenRequest, TokenSet, sha256_of

_AS_STORED = "tokens as stored, one row a sample"
_PADDED = f"{_AS_STORED}, without its padding (attention_mask 0), so that longer ones count more"


def stored_windows(want: TokenRequest) -> TokenSet:
    """The rows of `input_ids` (samples, length), the first `samples` of them if given, with their `attention_mask`.

    Every other tensor of a file is part of its samples: an entry of its first dimension for each row, or all of it
    where the file holds one sample. Several files hold a sample or more each. Raises CalibrationError for a file that
    is not so, and for a `samples` or `seq_len` that is not there.
    """
    given = want.source.given
    stored = _joined([_read(path) for path in want.source.files])
    check_stored(given, (len(stored), stored.length), want.samples, want.seq_len)
    chosen = stored[slice(want.samples)]
    return TokenSet(
        chosen.ids.contiguous(),
        given,
        _AS_STORED if chosen.mask is None else _PADDED,
        None,
        sha256_of(chosen),
        stored.tokens,
        (),
        chosen.mask,
        chosen.beside,
    )


def _joined(files: Sequence[Batch]) -> Batch:
    """The samples of all files, the shorter ones padded."""
    length = max(file.length for file in files)
    ids = torch.cat([pad(file.ids, (0, length - file.length)) for file in files])
    real = [torch.ones_like(file.ids, dtype=torch.bool) if file.mask is None else file.mask for file in files]
    mask = torch.cat([pad(each, (0, length - each.shape[1])) for each in real])
    some = any(file.beside for file in files)
    beside = tuple(sample for file in files for sample in file.beside or [{}] * len(file)) if some else ()
    return Batch(ids, None if bool(mask.all()) else mask, beside)


def _read(path: Path) -> Batch:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is no readable safetensors file ({error}): save it again.") from error
    names = ", ".join(tensors) or "no tensor at all"
    ids, mask = tensors.pop("input_ids", None), tensors.pop("attention_mask", None)
    tensors.pop("labels", None)  # what is to be predicted are the tokens themselves
    if ids is None:
        raise CalibrationError(f"{path} has no tensor input_ids, but {names}: rename the one that holds the token ids.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 2 or 0 in ids.shape:
        raise CalibrationError(
            f"input_ids in {path} is {list(ids.shape)} of {str(ids.dtype).removeprefix('torch.')}: "
            "save integers of shape (samples, length)."
        )
    ids = ids.to(torch.int64)
    tokens = Batch(ids) if mask is None else _padded(path, ids, mask)
    return replace(tokens, beside=_by_sample(path, len(ids), tensors))


def _by_sample(path: Path, samples: int, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ...]:
    for name, tensor in tensors.items():
        if samples > 1 and (not tensor.ndim or len(tensor) != samples):
            raise CalibrationError(
                f"{name} in {path} is {list(tensor.shape)} for {samples} samples of input_ids: save an entry for each, "
                "or a file for each sample in a folder."
            )
    if not tensors:
        return ()
    if samples == 1:
        return (dict(tensors),)
    return tuple({name: tensor[row : row + 1] for name, tensor in tensors.items()} for row in range(samples))


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
