"""Windows out of one stream of tokens, and what to say when the stream is too short for them."""

from __future__ import annotations

import torch

from calibration.errors import CalibrationError
from calibration.token_set import TokenRequest

_SHORTEST_WINDOW = 8


def window_length(want: TokenRequest, tokens: int, own: int = 0) -> tuple[int, list[str]]:
    """The length of a window of which `own` tokens are not from the text, and warnings.

    It is as wanted, or what `tokens` allow where the user left it open. Raises CalibrationError for too little text.
    """
    where = want.source.given
    if want.length <= own:
        raise CalibrationError(
            f"--seq-len {want.length} leaves no room for {where} after the BOS of each window: "
            f"ask for {own + 1} or more."
        )
    if tokens + own >= want.length:
        return want.length, []
    if want.seq_len is not None or tokens + own < _SHORTEST_WINDOW:
        raise CalibrationError(
            f"{where} has {tokens} tokens, too few for one window of {want.length}: "
            "give more text or a smaller --seq-len."
        )
    length = tokens + own
    return length, [f"{where} has only {tokens} tokens: its one window is {length} tokens long, not {want.length}."]


def consecutive(want: TokenRequest, stream: torch.Tensor, length: int) -> torch.Tensor:
    """(samples, length) from the start of `stream` (tokens,), as many as there are unless `samples` says how many."""
    whole = len(stream) // length
    if want.samples is not None:
        if whole < want.samples:
            raise _too_little(want, len(stream), length)
        whole = want.samples
    return stream[: whole * length].reshape(whole, length)


def drawn(want: TokenRequest, stream: torch.Tensor, length: int) -> torch.Tensor:
    """(samples, length) without overlap, in an order drawn with the seed, cut from an offset drawn with it.

    Fewer than wanted if the text is short and the user left `samples` open, else CalibrationError.
    """
    whole = len(stream) // length
    if want.samples is not None and whole < want.samples:
        raise _too_little(want, len(stream), length)
    generator = want.generator()
    offset = int(torch.randint(0, len(stream) - whole * length + 1, (1,), generator=generator))
    windows = stream[offset : offset + whole * length].reshape(whole, length)
    return windows[torch.randperm(whole, generator=generator)[: want.count]]


def _too_little(want: TokenRequest, tokens: int, length: int) -> CalibrationError:
    return CalibrationError(
        f"{want.source.given} has {tokens} tokens, but {want.count} samples of {length} need {want.count * length}: "
        f"give more text, at most --samples {tokens // length}, or a smaller --seq-len."
    )
