"""Text to windows of tokens, the same on every machine for the same seed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from calibration.errors import CalibrationError
from calibration.sources import Document, Role, Source, c4_calibration_rows, documents, paper_text

_MOST_DOCUMENTS_SHUFFLED = 10_000
_TEXT_PER_SAMPLE = 4
_SHORTEST_WINDOW = 8
_C4_EVALUATION_WINDOWS = 256


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], *, tokenize: bool) -> Any: ...


@dataclass(frozen=True)
class TokenSet:
    """`ids` (samples, length) int64 on the CPU; `protocol` says how the windows were made; `sha256` is of the ids."""

    ids: torch.Tensor
    source: str
    protocol: str
    seed: int | None
    sha256: str
    available_tokens: int
    warnings: tuple[str, ...]


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
    vocab_size: int,
) -> TokenSet:
    """Make windows from a source; None for `samples` or `seq_len` means that the user left them open.

    Calibration draws `samples` windows with the seed, evaluation takes consecutive ones, all of them unless `samples`
    is given. Raises CalibrationError for too little text, a missing tokenizer or ids that the model does not have.
    """
    if source.kind == "tokens":
        return _check_ids(_stored(source, samples, seq_len), vocab_size)
    if tokenizer is None:
        raise CalibrationError(
            f"The model's folder has no tokenizer, which {source.given} needs: add its tokenizer files, "
            "or give a .safetensors file with input_ids."
        )
    want = _Wanted(source, role, samples, seq_len, default_samples, default_seq_len, seed)
    if source.kind == "paper":
        tokens = _c4_samples(want, tokenizer) if want.draws_from_c4 else _paper(want, tokenizer)
    else:
        tokens = _packed(want, tokenizer)
    return _check_ids(tokens, vocab_size)


@dataclass(frozen=True)
class _Wanted:
    source: Source
    role: Role
    samples: int | None
    seq_len: int | None
    default_samples: int
    default_seq_len: int
    seed: int

    @property
    def length(self) -> int:
        return self.seq_len or self.default_seq_len

    @property
    def count(self) -> int:
        return self.samples or self.default_samples

    @property
    def draws_from_c4(self) -> bool:
        return self.source.given == "c4" and self.role == "calibration"

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _token_set(want: _Wanted, ids: torch.Tensor, protocol: str, available: int, warnings: Sequence[str]) -> TokenSet:
    seed = want.seed if want.role == "calibration" else None
    return TokenSet(ids, want.source.given, protocol, seed, _sha256(ids), available, tuple(warnings))


def _sha256(ids: torch.Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


# --- text of any kind -----------------------------------------------------------------------------------------------


def _packed(want: _Wanted, tokenizer: Tokenizer) -> TokenSet:
    """Documents joined by EOS into one stream, cut into windows."""
    enough = _TEXT_PER_SAMPLE * want.count * want.length if want.role == "calibration" else None
    if want.role == "evaluation" and want.samples is not None:
        enough = want.samples * want.length
    stream = _stream(_ordered(want), tokenizer, want.source.given, enough)
    bos = _bos_before_text(tokenizer)
    own = 1 if bos is not None else 0
    length, warnings = _length(want, len(stream) + own)
    windows = _windows(want, stream, length - own)
    if bos is not None:
        windows = torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)
    if want.role == "calibration" and len(windows) < want.count:
        warnings.append(f"{want.source.given} gives {len(windows)} samples of {length} tokens, not {want.count}.")
    return _token_set(want, windows, _protocol(want, tokenizer, bos), len(stream), warnings)


def _protocol(want: _Wanted, tokenizer: Tokenizer, bos: int | None) -> str:
    parts = ["documents in an order drawn with the seed" if want.role == "calibration" else "documents in order"]
    parts.append("tokenised without special tokens and packed")
    if tokenizer.eos_token_id is not None:
        parts.append("with EOS between documents")
    parts.append("cut into consecutive windows")
    if want.role == "calibration":
        parts.append("of which samples are drawn with the seed")
    if bos is not None:
        parts.append("each after a BOS of its own")
    return ", ".join(parts)


def _ordered(want: _Wanted) -> Iterator[Document]:
    found = documents(want.source, want.role)
    if want.role == "evaluation":
        return found
    head = list(itertools.islice(found, _MOST_DOCUMENTS_SHUFFLED))
    order = torch.randperm(len(head), generator=want.generator()).tolist()
    return itertools.chain((head[index] for index in order), found)


def _stream(found: Iterator[Document], tokenizer: Tokenizer, where: str, enough: int | None) -> torch.Tensor:
    ids: list[int] = []
    for document in found:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer(_as_text(document, tokenizer, where), add_special_tokens=False)["input_ids"]
        if enough is not None and len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.int64)


def _as_text(document: Document, tokenizer: Tokenizer, where: str) -> str:
    if isinstance(document, str):
        return document
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"{where} holds chats, but the tokenizer has no chat template: use plain text, or an instruct model."
        )
    return tokenizer.apply_chat_template(document, tokenize=False)


def _bos_before_text(tokenizer: Tokenizer) -> int | None:
    """The BOS that the tokenizer itself puts before a text: such models are lost in a window without it."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None


def _length(want: _Wanted, available: int) -> tuple[int, list[str]]:
    """The window length: as wanted, or what there is if the user left it open."""
    if available >= want.length:
        return want.length, []
    if want.seq_len is not None or available < _SHORTEST_WINDOW:
        raise CalibrationError(
            f"{want.source.given} has {available} tokens, too few for one window of {want.length}: "
            "give more text or a smaller --seq-len."
        )
    return available, [f"{want.source.given} has {available} tokens only, so windows are {available} tokens long."]


def _windows(want: _Wanted, stream: torch.Tensor, length: int) -> torch.Tensor:
    """(samples, length): for calibration from a random offset and in random order, else from the start."""
    whole = len(stream) // length
    if want.role == "evaluation":
        if want.samples is not None and whole < want.samples:
            raise _too_little(want, len(stream), whole)
        count = want.samples or whole
        return stream[: count * length].reshape(count, length)
    if want.samples is not None and whole < want.samples:
        raise _too_little(want, len(stream), whole)
    generator = want.generator()
    offset = int(torch.randint(0, len(stream) - whole * length + 1, (1,), generator=generator))
    windows = stream[offset : offset + whole * length].reshape(whole, length)
    return windows[torch.randperm(whole, generator=generator)[: want.count]]


def _too_little(want: _Wanted, available: int, whole: int) -> CalibrationError:
    return CalibrationError(
        f"{want.source.given} has {available} tokens, but {want.count} samples of {want.length} need "
        f"{want.count * want.length}: give more text, at most --samples {whole}, or a smaller --seq-len."
    )


# --- the papers' own protocols --------------------------------------------------------------------------------------


def _paper(want: _Wanted, tokenizer: Tokenizer) -> TokenSet:
    """One string, tokenised at once with the tokenizer's own special tokens, as the authors' code does."""
    text = paper_text(want.source.given, want.role)
    stream = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    if want.source.given == "c4":
        stream = stream[: _C4_EVALUATION_WINDOWS * want.length]
    length, warnings = _length(want, len(stream))
    if want.role == "evaluation":
        return _token_set(want, _windows(want, stream, length), _PAPER_EVALUATION, len(stream), warnings)
    starts = torch.randint(0, len(stream) - length + 1, (want.count,), generator=want.generator())
    ids = torch.stack([stream[start : start + length] for start in starts.tolist()])
    return _token_set(want, ids, _PAPER_CALIBRATION, len(stream), warnings)


_PAPER_EVALUATION = (
    "the papers' protocol: the text tokenised as one string, cut into consecutive windows, the rest dropped"
)
_PAPER_CALIBRATION = "the papers' protocol: the text tokenised as one string, windows from random starts"
_C4_CALIBRATION = "the papers' protocol: random documents longer than a sample, one random window of each"


def _c4_samples(want: _Wanted, tokenizer: Tokenizer) -> TokenSet:
    rows = c4_calibration_rows()
    generator = want.generator()
    draw: Callable[[int], int] = lambda below: int(torch.randint(0, below, (1,), generator=generator))  # noqa: E731
    picked: list[torch.Tensor] = []
    seen = 0
    for index in torch.randperm(len(rows), generator=generator).tolist():
        ids = tokenizer(rows[index]["text"])["input_ids"]
        seen += len(ids)
        if len(ids) > want.length:
            start = draw(len(ids) - want.length)
            picked.append(torch.tensor(ids[start : start + want.length], dtype=torch.int64))
        if len(picked) == want.count:
            return _token_set(want, torch.stack(picked), _C4_CALIBRATION, seen, ())
    raise CalibrationError(
        f"c4 has only {len(picked)} documents longer than {want.length} tokens, {want.count} are needed: "
        "ask for fewer --samples or a smaller --seq-len."
    )


# --- tokens that are stored already ---------------------------------------------------------------------------------


def _stored(source: Source, samples: int | None, seq_len: int | None) -> TokenSet:
    path = source.files[0]
    ids = _read_ids(path)
    if seq_len is not None and seq_len != ids.shape[1]:
        raise CalibrationError(
            f"{path} holds samples of {ids.shape[1]} tokens, used as they are: leave out --seq-len {seq_len}."
        )
    if samples is not None and samples > len(ids):
        raise CalibrationError(f"{path} holds {len(ids)} samples, but --samples asks for {samples}.")
    chosen = ids[: samples or len(ids)].contiguous()
    protocol = "tokens as stored, one row a sample"
    return TokenSet(chosen, source.given, protocol, None, _sha256(chosen), ids.numel(), ())


def _read_ids(path: Path) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            names = list(stored.keys())
            ids = stored.get_tensor("input_ids") if "input_ids" in names else None
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is no readable safetensors file ({error}).") from error
    if ids is None:
        raise CalibrationError(f"{path} has no tensor input_ids, it has {', '.join(names) or 'none'}.")
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 2 or 0 in ids.shape:
        raise CalibrationError(
            f"input_ids in {path} is {list(ids.shape)} of {ids.dtype}: expected integers of shape (samples, length)."
        )
    return ids.to(torch.int64)


def _check_ids(tokens: TokenSet, vocab_size: int) -> TokenSet:
    least, most = int(tokens.ids.min()), int(tokens.ids.max())
    if least < 0 or most >= vocab_size:
        raise CalibrationError(
            f"{tokens.source} has the token {most if most >= vocab_size else least}, but the model knows 0 to "
            f"{vocab_size - 1}: it was made for another model."
        )
    return tokens
