"""Text of any kind: documents packed into one stream of tokens and cut into windows."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator

import torch

from calibration.chats import ChatTokens
from calibration.opening import Opening, find_opening
from calibration.rows import Document
from calibration.sources import documents
from calibration.token_set import Tokenizer, TokenRequest, TokenSet, token_set, tokenise
from calibration.windows import consecutive, cutter_for, drawn

_MOST_DOCUMENTS_SHUFFLED = 10_000
# Books are long: without it, gigabytes would be fetched and held before the first is tokenised.
_MOST_CHARACTERS_SHUFFLED = 1 << 27
_TOKENS_PER_TOKEN_USED = 4
_LONG_DOCUMENT = 1 << 18


def packed(want: TokenRequest, tokenizer: Tokenizer) -> TokenSet:
    """Documents joined by EOS into one stream, cut into windows. Raises CalibrationError for too little text."""
    stream, opening = _stream(want, tokenizer), find_opening(tokenizer)
    cutter, warnings = cutter_for(want, len(stream), opening)
    draw = want.role == "calibration"
    windows = (drawn if draw else consecutive)(want, stream, cutter)
    if draw and len(windows) < want.count and not warnings:
        warnings = [f"{want.source.given} gives {len(windows)} samples of {cutter.length} tokens, not {want.count}."]
    protocol = _protocol(want, tokenizer, opening)
    return token_set(want.source, windows, protocol, len(stream), seed=want.seed if draw else None, warnings=warnings)


def _protocol(want: TokenRequest, tokenizer: Tokenizer, opening: Opening) -> str:
    draw = want.role == "calibration"
    parts = ["documents in an order drawn with the seed (long ones in pieces)" if draw else "documents in order"]
    parts.append("tokenised without special tokens and packed")
    if tokenizer.eos_token_id is not None:
        parts.append("with EOS between documents")
    parts.append(f"cut into consecutive windows, {opening.told}")
    parts.append("of which samples are drawn with the seed" if draw else "the remainder dropped")
    return ", ".join(parts)


def _stream(want: TokenRequest, tokenizer: Tokenizer) -> torch.Tensor:
    """(tokens,): all of the text, or as much of it as the windows can need."""
    enough, eos = _enough(want), tokenizer.eos_token_id
    chats = ChatTokens(tokenizer, want.source.given)
    ids = array("q")
    for document in _ordered(want):
        is_text = isinstance(document, str)
        found = tokenise(tokenizer, document, special_tokens=False) if is_text else chats.ids(document)
        # A text that carries its special tokens has an EOS already.
        if ids and found and eos is not None and ids[-1] != eos:
            ids.append(eos)
        ids.extend(found)
        if enough is not None and len(ids) >= enough:
            break
    return torch.frombuffer(ids, dtype=torch.int64).clone() if ids else torch.empty(0, dtype=torch.int64)


def _enough(want: TokenRequest) -> int | None:
    if want.role == "calibration":
        return _TOKENS_PER_TOKEN_USED * want.count * want.length
    return None if want.samples is None else want.samples * want.length


def _ordered(want: TokenRequest) -> Iterator[Document]:
    found = documents(want.source, want.role)
    if want.role == "evaluation":
        return found
    pieces = itertools.chain.from_iterable(map(_pieces, found))
    head = _head(pieces)
    order = torch.randperm(len(head), generator=want.generator()).tolist()
    return itertools.chain((head[index] for index in order), pieces)


def _head(documents: Iterator[Document]) -> list[Document]:
    """The documents that are shuffled; chats count for nothing, they are short."""
    head: list[Document] = []
    characters = 0
    for document in itertools.islice(documents, _MOST_DOCUMENTS_SHUFFLED):
        head.append(document)
        characters += len(document) if isinstance(document, str) else 0
        if characters >= _MOST_CHARACTERS_SHUFFLED:
            break
    return head


def _pieces(document: Document) -> Iterator[Document]:
    """A long text cut at ends of lines, so that of a file of gigabytes only a few places are tokenised."""
    if not isinstance(document, str):
        yield document
        return
    start = 0
    while len(document) - start > _LONG_DOCUMENT:
        line_end = document.rfind("\n", start, start + _LONG_DOCUMENT)
        end = start + _LONG_DOCUMENT if line_end < 0 else line_end + 1
        yield document[start:end]
        start = end
    yield document[start:]
