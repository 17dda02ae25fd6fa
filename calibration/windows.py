"""Windows out of one stream of tokens, and what to say when the stream is too short for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibration.errors import CalibrationError
from calibration.opening import NO_OPENING, Opening
from calibration.token_set import TokenRequest

_SHORTEST_WINDOW = 8


@dataclass(frozen=True)
class Cutter:
    """Cuts windows of `length` tokens that all begin with `opening`, which text that has it itself is not given again.

    Streams are (tokens,).
    """

    length: int
    opening: Opening = NO_OPENING

    @property
    def step(self) -> int:
        """How many tokens of a text a window takes."""
        return self.length - len(self.opening.ids)

    def taken(self, stream: torch.Tensor, start: int) -> int:
        """How many tokens the window from `start` takes of `stream`."""
        return self.length if self.opening.begins(stream[start : start + self.length]) else self.step

    def starts(self, stream: torch.Tensor, start: int = 0) -> list[int]:
        """Of windows one after the other, from `start` to the end."""
        found: list[int] = []
        while (end := start + self.taken(stream, start)) <= len(stream):
            found.append(start)
            start = end
        return found

    def windows(self, stream: torch.Tensor, starts: list[int]) -> torch.Tensor:
        """(windows, length) from each of `starts`, where there are tokens enough."""
        opening = torch.tensor(self.opening.ids, dtype=stream.dtype)
        pieces = [stream[start : start + self.taken(stream, start)] for start in starts]
        found = [piece if len(piece) == self.length else torch.cat([opening, piece]) for piece in pieces]
        return torch.stack(found) if found else stream.new_empty(0, self.length)


def cutter_for(want: TokenRequest, tokens: int, opening: Opening = NO_OPENING) -> tuple[Cutter, list[str]]:
    """Windows as long as wanted, or as long as `tokens` allow where the user left it open, and warnings.

    Raises CalibrationError for too little text.
    """
    where, own = want.source.given, len(opening.ids)
    check_room(want, opening)
    if tokens + own >= want.length:
        return Cutter(want.length, opening), []
    if want.seq_len is not None or tokens + own < _SHORTEST_WINDOW:
        raise CalibrationError(
            f"{where} has {tokens} tokens, too few for one window of {want.length}: "
            "give more text or a smaller --seq-len."
        )
    length = tokens + own
    warning = f"{where} has only {tokens} tokens: its one window is {length} tokens long, not {want.length}."
    return Cutter(length, opening), [warning]


def check_room(want: TokenRequest, opening: Opening) -> None:
    """Raise CalibrationError where no token of the text would be left in a window."""
    if want.length <= len(opening.ids):
        raise CalibrationError(
            f"--seq-len {want.length} leaves no room for {want.source.given} after the BOS of each window: "
            f"ask for {len(opening.ids) + 1} or more."
        )


def consecutive(want: TokenRequest, stream: torch.Tensor, cutter: Cutter) -> torch.Tensor:
    """(samples, length) from the start of `stream` (tokens,), as many as there are unless `samples` says how many."""
    starts = cutter.starts(stream)
    if want.samples is not None and len(starts) < want.samples:
        raise _too_little(want, len(stream), cutter.step, len(starts))
    return cutter.windows(stream, starts[: want.samples])


def drawn(want: TokenRequest, stream: torch.Tensor, cutter: Cutter) -> torch.Tensor:
    """(samples, length) without overlap, in an order drawn with the seed, cut from an offset drawn with it.

    Fewer than wanted if the text is short and the user left `samples` open, else CalibrationError.
    """
    starts = cutter.starts(stream)
    if want.samples is not None and len(starts) < want.samples:
        raise _too_little(want, len(stream), cutter.step, len(starts))
    generator = want.generator()
    left = len(stream) - (starts[-1] + cutter.taken(stream, starts[-1]) if starts else 0)
    moved = cutter.starts(stream, int(torch.randint(0, left + 1, (1,), generator=generator)))
    # Moved windows may meet openings in the text that leave room for fewer.
    starts = moved[: len(starts)] if len(moved) >= len(starts) else starts
    order = torch.randperm(len(starts), generator=generator)[: want.count].tolist()
    return cutter.windows(stream, [starts[index] for index in order])


def _too_little(want: TokenRequest, tokens: int, step: int, most: int) -> CalibrationError:
    return CalibrationError(
        f"{want.source.given} has {tokens} tokens, but {want.count} samples of {step} need {want.count * step}: "
        f"give more text, at most --samples {most}, or a smaller --seq-len."
    )
