"""Text to windows of tokens, the same on every machine for the same seed."""

from __future__ import annotations

from calibration.errors import CalibrationError
from calibration.packing import packed
from calibration.papers import paper_windows
from calibration.sources import Role, Source
from calibration.stored import stored_windows
from calibration.token_set import Tokenizer, TokenRequest, TokenSet

__all__ = ["TokenSet", "Tokenizer", "load_tokens"]


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
    elif tokenizer is None:
        raise CalibrationError(
            f"The model's folder has no tokenizer, which {source.given} needs: add its tokenizer files, "
            "or give a .safetensors file with input_ids."
        )
    elif source.kind == "paper":
        tokens = paper_windows(want, tokenizer)
    else:
        tokens = packed(want, tokenizer)
    _check_ids(tokens, source, vocab_size)
    return tokens


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
