"""Text to windows of tokens, the same on every machine for the same seed."""

from __future__ import annotations

from dataclasses import replace

import torch

from calibration.batch import Batch
from calibration.errors import CalibrationError, no_tokenizer
from calibration.opening import Opening, find_opening
from calibration.packing import packed
from calibration.papers import paper_windows
from calibration.sources import Role, Source
from calibration.stored import stored_windows
from calibration.token_set import Tokenizer, TokenRequest, TokenSet, sha256_of

__all__ = ["TokenSet", "Tokenizer", "load_tokens", "some_windows"]


def load_tokens(
    source: Source,
    tokenizer: Tokenizer | None,
    *,
    role: Role,
    samples: int | None,
    seq_len: int | None,
    default_samples: int,
    default_seq_len: int,
    seed: int,
    vocab_size: int | None = None,
) -> TokenSet:
    """Make windows from a source; None for `samples` or `seq_len` means that the user left them open.

    Calibration draws `samples` windows with the seed, evaluation takes consecutive ones, all of them unless `samples`
    is given. Raises CalibrationError for too little text, a missing tokenizer or ids of `vocab_size` and above.
    """
    want = TokenRequest(source, role, samples, seq_len, default_samples, default_seq_len, seed)
    if source.kind == "tokens":
        tokens = stored_windows(want)
        tokens = tokens if tokenizer is None else _with_beginning_warned(tokens, find_opening(tokenizer))
    elif tokenizer is None:
        raise no_tokenizer(source.given)
    elif source.kind == "paper":
        tokens = paper_windows(want, tokenizer)
    else:
        tokens = packed(want, tokenizer)
    _check_ids(tokens, source, vocab_size)
    return tokens


def some_windows(tokens: TokenSet, count: int, seed: int) -> TokenSet:
    """`count` of the windows, drawn with the seed and in their order; all of them where there are no more."""
    total = len(tokens.ids)
    if count >= total:
        return tokens
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    mask = None if tokens.mask is None else tokens.mask[drawn]
    beside = tuple(tokens.beside[row] for row in drawn.tolist()) if tokens.beside else ()
    windows = Batch(tokens.ids[drawn], mask, beside)
    protocol = f"{tokens.protocol}; {count} of the {total} windows, drawn with the seed"
    facts = {"protocol": protocol, "seed": seed, "sha256": sha256_of(windows)}
    return replace(tokens, ids=windows.ids, mask=mask, beside=beside, **facts)


def _with_beginning_warned(tokens: TokenSet, opening: Opening) -> TokenSet:
    """Stored rows stay as they are; those without what the tokenizer puts before a text are told."""
    without = sum(not opening.begins(row) for row in tokens.ids)
    if not opening.ids or not without:
        return tokens
    return replace(
        tokens,
        warnings=(
            *tokens.warnings,
            f"{tokens.source} has {without} rows (of {len(tokens.ids)}) that do not begin as texts of this model do "
            f"({opening.told}): many models are lost without it, so store it with the tokens.",
        ),
    )


def _check_ids(tokens: TokenSet, source: Source, vocab_size: int | None) -> None:
    least, most = int(tokens.ids.min()), int(tokens.ids.max())
    if least >= 0 and (vocab_size is None or most < vocab_size):
        return
    known = "0 and above" if vocab_size is None else f"0 to {vocab_size - 1}"
    what = "file" if source.kind == "tokens" else "tokenizer"
    raise CalibrationError(
        f"{source.given} gives the token {least if least < 0 else most}, but the model knows {known}: "
        f"use a {what} that was made for this model."
    )
