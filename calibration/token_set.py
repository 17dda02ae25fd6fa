"""What is asked of a text, and the windows of tokens that come of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from calibration.batch import Batch
from calibration.sources import Role, Source


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: Any
    eos_token_id: Any
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Any: ...
    def apply_chat_template(self, conversation: Any, *, tokenize: bool, return_dict: bool = True) -> Any: ...
    def decode(self, token_ids: Sequence[int]) -> Any: ...


@dataclass(frozen=True)
class TokenSet:
    """Windows of tokens and how they were made.

    `ids` (samples, length) int64 on the CPU; `protocol` says how the windows were cut; `seed` is None where nothing is
    drawn; `mask` and `beside` are as in `Batch`; `sha256` is of the ids, their shape and these two;
    `available_tokens` is how many the windows were taken from; behind the given windows stand `copies` more of each
    that a model has sampled.
    """

    ids: torch.Tensor
    source: str
    protocol: str
    seed: int | None
    sha256: str
    available_tokens: int
    warnings: tuple[str, ...]
    mask: torch.Tensor | None = None
    beside: tuple[Mapping[str, torch.Tensor], ...] = ()
    copies: int = 0

    @property
    def windows(self) -> Batch:
        """All of them, with their padding and what stands beside them."""
        return Batch(self.ids, self.mask, self.beside)

    @property
    def sampled(self) -> int:
        """How many of the windows a model has sampled."""
        return len(self.ids) // (1 + self.copies) * self.copies


@dataclass(frozen=True)
class TokenRequest:
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
    """The TokenSet of `ids` (samples, length) without padding, with their hash."""
    return TokenSet(ids, source.given, protocol, seed, sha256_of(Batch(ids)), available, tuple(warnings))


def sha256_of(windows: Batch) -> str:
    """Of the ids, their shape and, where there are such, the mask and what stands beside the samples."""
    digest = hashlib.sha256(repr(tuple(windows.ids.shape)).encode())
    digest.update(windows.ids.contiguous().numpy().astype("<i8").tobytes())
    if windows.mask is not None:
        digest.update(windows.mask.contiguous().numpy().tobytes())
    for sample in windows.beside:
        for name, tensor in sorted(sample.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
