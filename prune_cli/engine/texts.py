"""Calibration and evaluation texts, opened and turned into windows of the model's own tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from calibration.errors import CalibrationError
from calibration.sources import Role
from calibration.sources import Source as TextSource
from calibration.tokens import TokenSet, load_tokens, some_windows
from prune_cli.errors import RequestError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.request.request import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN


@dataclass(frozen=True)
class Texts:
    """The windows of a run, each None where nothing reads them."""

    calibration: TokenSet | None
    evaluation: TokenSet | None


@dataclass(frozen=True)
class TextReader:
    """Turns texts into windows of the model's own tokens; `seq_len` is None where the user left it open."""

    model: StreamedModel
    tokenizer: Any | None
    seq_len: int | None
    seed: int

    def read(self, text: TextSource, role: Role, samples: int | None) -> TokenSet:
        """Windows of `text`, as many as `load_tokens` says. Raises RequestError for text that does not do."""
        limit = self.model.position_limit
        try:
            tokens = load_tokens(
                text,
                self.tokenizer,
                role=role,
                samples=samples,
                seq_len=self.seq_len,
                default_samples=DEFAULT_SAMPLES,
                default_seq_len=min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN),
                seed=self.seed,
                vocab_size=self.model.vocab_size,
            )
        except CalibrationError as error:
            raise RequestError(str(error)) from error
        length = tokens.windows.length
        if limit is not None and length > limit:
            raise RequestError(
                f"{text.given} holds samples of {length} tokens, but the model takes at most {limit} positions: cut "
                "them."
            )
        return self._as_taken(tokens)

    def _as_taken(self, tokens: TokenSet) -> TokenSet:
        """Without what the model's forward does not take, which is told."""
        names = sorted({name for sample in tokens.beside for name in sample})
        left = [name for name in names if not self.model.takes(name)]
        if not left:
            return tokens
        beside = tuple({name: each for name, each in s.items() if name not in left} for s in tokens.beside)
        warning = f"{tokens.source} holds {', '.join(left)}, which {type(self.model.model).__name__} does not take."
        return replace(tokens, beside=beside if any(beside) else (), warnings=(*tokens.warnings, warning))


def read_evaluation(reader: TextReader, text: TextSource, windows: int | Literal["all"] | None) -> TokenSet:
    """So many windows of `text`, drawn with the reader's seed; None and "all" are all of them."""
    tokens = reader.read(text, "evaluation", None)
    return some_windows(tokens, windows, reader.seed) if isinstance(windows, int) else tokens


def check_seq_len(model: StreamedModel, seq_len: int | None) -> None:
    limit = model.position_limit
    if seq_len is not None and limit is not None and seq_len > limit:
        raise RequestError(f"--seq-len is {seq_len}, but the model takes at most {limit} positions.")
