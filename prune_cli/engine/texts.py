"""Calibration and evaluation texts, opened and turned into windows of the model's own tokens."""

from __future__ import annotations

from typing import Any

from calibration.errors import CalibrationError
from calibration.sources import Role, parse_source
from calibration.sources import Source as TextSource
from calibration.tokens import TokenSet, load_tokens
from prune_cli.errors import RequestError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.request.request import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN


def open_text(text: str) -> TextSource:
    if not text.strip():
        raise RequestError("The text to read is an empty name: give a file, a folder, or a name like builtin.")
    try:
        return parse_source(text)
    except CalibrationError as error:
        raise RequestError(str(error)) from error


def read_tokens(
    text: TextSource,
    model: StreamedModel,
    tokenizer: Any | None,
    role: Role,
    samples: int | None,
    seq_len: int | None,
    seed: int,
) -> TokenSet:
    """Windows of `text` in the model's own tokens. Raises RequestError for text that does not do."""
    try:
        tokens = load_tokens(
            text,
            tokenizer,
            role=role,
            samples=samples,
            seq_len=seq_len,
            default_samples=DEFAULT_SAMPLES,
            default_seq_len=min(DEFAULT_SEQ_LEN, model.position_limit or DEFAULT_SEQ_LEN),
            seed=seed,
            vocab_size=model.vocab_size,
        )
    except CalibrationError as error:
        raise RequestError(str(error)) from error
    length, limit = tokens.ids.shape[1], model.position_limit
    if limit is not None and length > limit:
        raise RequestError(
            f"{text.given} holds samples of {length} tokens, but the model takes at most {limit} positions: cut them."
        )
    return tokens


def check_seq_len(model: StreamedModel, seq_len: int | None) -> None:
    limit = model.position_limit
    if seq_len is not None and limit is not None and seq_len > limit:
        raise RequestError(f"--seq-len is {seq_len}, but the model takes at most {limit} positions.")
