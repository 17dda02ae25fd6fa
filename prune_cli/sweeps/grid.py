"""What a person types for the grid of a sweep: sparsities as ranges, methods with their steps. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from methods import method_names
from prune_cli.errors import RequestError
from prune_cli.request.presets import PRESETS

_MOST_SPARSITIES = 1000
_DENSE = "dense"
_RECONSTRUCT = "reconstruct"
_WORD = re.compile(r"[a-z0-9_-]+")


def parse_sparsities(text: str) -> tuple[float, ...]:
    """'0:0.9:0.1' (from, to, step; both ends belong to it), '0.3,0.55', or both mixed; ascending, each once.

    Raises RequestError for anything else, and for a sparsity that is not at least 0 and below 1.
    """
    values: set[Decimal] = set()
    for part in text.split(","):
        values |= _range(text, part)
        if len(values) > _MOST_SPARSITIES:
            raise RequestError(
                f"--sparsity {text!r} asks for more than {_MOST_SPARSITIES} sparsities: use a wider step."
            )
    wrong = [value for value in values if not 0 <= value < 1]
    if wrong:
        raise RequestError(f"--sparsity {text!r} holds {wrong[0]}, but each must be at least 0 and below 1.")
    return tuple(sorted(float(value) for value in values))


def _range(whole: str, part: str) -> set[Decimal]:
    try:
        numbers = [Decimal(number.strip()) for number in part.split(":")]
    except InvalidOperation:
        numbers = []
    if not all(number.is_finite() for number in numbers) or len(numbers) not in (1, 3):
        raise RequestError(f"--sparsity is {whole!r}: give FROM:TO:STEP as 0:0.9:0.1, or sparsities as 0.5,0.6.")
    if len(numbers) == 1:
        return set(numbers)
    first, last, step = numbers
    if step <= 0 or last < first or (last - first) / step > _MOST_SPARSITIES:
        raise RequestError(
            f"--sparsity {part!r} is no range: FROM:TO:STEP needs a step above 0, TO not below FROM, and at most "
            f"{_MOST_SPARSITIES} steps."
        )
    return {first + step * at for at in range(int((last - first) / step) + 1)}


def parse_list(option: str, text: str) -> tuple[str, ...]:
    """Words between commas, each once, in their order. Raises RequestError for an empty one."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise RequestError(f"{option} is {text!r}: give names with commas between them.")
    return tuple(dict.fromkeys(words))


def parse_method(text: str) -> dict[str, Any]:
    """'wanda', 'best', 'wanda+swaps+reconstruct' or 'sparsegpt+dense' to fields of a PruneRequest.

    The first word is a method or a preset; what follows are steps, and `dense` for --target dense. Whether they go
    together is for the request to say. Raises RequestError for words that are neither.
    """
    first, *following = text.split("+")
    if not all(_WORD.fullmatch(word) for word in (first, *following)):
        raise RequestError(f"--method holds {text!r}: give METHOD or METHOD+STEP+STEP, as wanda+swaps.")
    presets = [name for name, said in PRESETS.items() if not said.get("match_blocks")]  # a sweep trains nothing
    if first in presets:
        said = dict(PRESETS[first])
    elif first in method_names():
        said = {"method": first}
    else:
        raise RequestError(
            f"There is no method or preset {first!r}: choose of {', '.join((*method_names(), *presets))}."
        )
    for word in following:
        key, value = {_DENSE: ("target", "dense"), _RECONSTRUCT: ("reconstruct", True)}.get(word, ("refine", word))
        if key in said and key != "target":
            raise RequestError(f"--method holds {text!r}, which has two steps of a kind: give one refinement.")
        said[key] = value
    return said


def options_of(method: str, said: Mapping[str, Any], given: Mapping[str, Any], alone: bool) -> dict[str, Any]:
    """Those of `given` (-o KEY=VALUE) that are for this entry of --method: METHOD.KEY, STEP.KEY, or KEY if `alone`."""
    steps = [said.get("refine"), _RECONSTRUCT if said.get("reconstruct") else None]
    owners = {said["method"], method.partition("+")[0]}
    found = {}
    for key, value in given.items():
        owner, dot, name = key.partition(".")
        if (not dot and alone) or (dot and owner in steps):
            found[key] = value
        elif dot and owner in owners:
            found[name] = value
    return found
