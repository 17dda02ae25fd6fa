"""What is asked of a text, and the windows of tokens that come of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from calibration.sources import Role, Source


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: Any
    eos_token_id: Any
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Any: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], *, tokenize: bool) -> Any: ...


@dataclass(frozen=True)
class TokenSet:
    """Windows of tokens and how they were made.

    `ids` (samples, length) int64 on the CPU; `protocol` says how the windows were cut; `seed` is None where nothing is
    drawn; `sha256` is of the ids and their shape; `available_tokens` is how many the windows were taken from.
    """

    ids: torch.Tensor
    source: str
    protocol: str
    seed: int | None
    sha256: str
    available_tokens: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What a user asks for; None for `samples` or `seq_len` means that it was left open."""

    source: Source
    role: Role
    samples: int | None
    seq_len: int | None
    default_samples: int
    default_seq_len: int
    seed: int

    @property
    def length(self) -> int:
        return self.default_seq_len if self.seq_len is None else self.seq_len

    @property
    def count(self) -> int:
        return self.default_samples if self.samples is None else self.samples

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def tokenise(tokenizer: Tokenizer, text: str, *, special_tokens: bool) -> list[int]:
    """The ids of a text of any length."""
    # verbose=False: a whole text is longer than the model's context, about which Hugging Face would warn.
    return tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]


def token_set(
    source: Source, ids: torch.Tensor, protocol: str, available: int, *, seed: int | None, warnings: Sequence[str] = ()
) -> TokenSet:
    """The TokenSet of `ids` (samples, length), with their hash."""
    return TokenSet(ids, source.given, protocol, seed, digest_of(ids), available, tuple(warnings))


def digest_of(ids: torch.Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
