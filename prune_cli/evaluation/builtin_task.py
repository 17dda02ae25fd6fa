"""A multiple-choice task that needs no network: which of four passages goes on from a piece of the builtin text.

Made of its held-out part, so the same everywhere; SHA256 is its version.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from calibration.builtin import builtin_documents
from prune_cli.errors import PruneError

NAME = "builtin"
SHA256 = "f54be6e7bd33c9f0b17529ab118489a4cee4f25c82cb45f1645ea5de1b846926"
CHOICES, CHANCE = 4, 0.25
_CONTEXT, _PASSAGE, _STRIDE = 320, 60, 1800
_SEED = 20


@dataclass(frozen=True)
class Item:
    """`choices[answer]` is what follows `context` in the text; the others stand in other documents."""

    context: str
    choices: tuple[str, ...]
    answer: int


def builtin_items() -> list[Item]:
    """All items, in an order that mixes documents. Raises PruneError where they are not those of this version."""
    items = _drawn()
    if fingerprint(items) != SHA256:
        raise PruneError("The builtin task is not that of this version of prune-cli: install it again.")
    return items


def fingerprint(items: list[Item]) -> str:
    """sha256 of the items as JSON."""
    return hashlib.sha256(json.dumps([[i.context, i.choices, i.answer] for i in items]).encode()).hexdigest()


def _drawn() -> list[Item]:
    draw = random.Random(_SEED)
    passages = [_passages(text) for text in builtin_documents("test")]
    items = [item for number in range(len(passages)) for item in _of_document(passages, number, draw)]
    draw.shuffle(items)
    return items


def _passages(text: str) -> list[tuple[str, str]]:
    """Pieces of a document, each with what follows it; they end and begin at the white space before a word."""
    begins = [_next_space(text, place) for place in range(_CONTEXT, len(text) - 2 * _PASSAGE, _STRIDE)]
    return [(text[begin - _CONTEXT : begin], text[begin : _next_space(text, begin + _PASSAGE)]) for begin in begins]


def _of_document(passages: list[list[tuple[str, str]]], number: int, draw: random.Random) -> Iterator[Item]:
    """The wrong choices follow pieces of three other documents."""
    others = [document for place, document in enumerate(passages) if place != number and document]
    for context, answer in passages[number]:
        choices = [answer, *(draw.choice(document)[1] for document in draw.sample(others, CHOICES - 1))]
        draw.shuffle(choices)
        yield Item(context, tuple(choices), choices.index(answer))


def _next_space(text: str, place: int) -> int:
    """Where the white space before the next word begins."""
    while place < len(text) and not (text[place].isspace() and not text[place - 1].isspace()):
        place += 1
    return place
