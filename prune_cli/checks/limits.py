"""The limits of rules as they are typed: 5%, 0.3, 0.6x, 4GB. No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from prune_cli.errors import RequestError
from prune_cli.request.sizes import NUMBER, UNIT, bytes_of

_NUMBER = re.compile(rf"{NUMBER}\s*(%|x|{UNIT})?", re.IGNORECASE)
Kind = Literal["number", "share", "increase", "size", "bound"]


@dataclass(frozen=True)
class Limit:
    """`value` of a rule: `relative` to the dense model's figure (0.05 for 5 %, 0.6 for 0.6x), else absolute."""

    text: str
    value: float
    relative: bool = False


def parse_bound(name: str, text: str) -> Limit:
    """What a field of a report is held against: a number, a share as 49%, bytes as 4GB. Raises RequestError."""
    found = _NUMBER.fullmatch(text.strip())
    unit = (found[2] or "").lower() if found else "x"
    if found is None or unit == "x":
        raise RequestError(f"{name} is {text!r}, but must be a number, a share as 49%, or bytes as 4GB or 900MiB.")
    return Limit(text, float(found[1]) * (0.01 if unit == "%" else bytes_of(unit or "b")))


def parse_limit(option: str, text: str, kind: Kind) -> Limit:
    """The limit `text` of `option`. Raises RequestError for what is none of its kind.

    number: 12.5; share: 0.49 or 49%; increase: 0.3 (absolute) or 5%; size: 0.6x, or bytes as 4GB (10^9) or 4GiB (2^30).
    """
    found = _NUMBER.fullmatch(text.strip())
    value, unit = (float(found[1]), (found[2] or "").lower()) if found else (math.nan, "")
    if kind == "number" and found and not unit:
        return Limit(text, value)
    if kind == "share" and found and unit in ("", "%"):
        share = value / 100 if unit else value
        if share <= 1:
            return Limit(text, share)
    if kind == "increase" and found and unit in ("", "%"):
        return Limit(text, value / 100 if unit else value, relative=bool(unit))
    if kind == "size" and found and unit and unit != "%":
        return Limit(text, value if unit == "x" else value * bytes_of(unit), relative=unit == "x")
    wanted = {
        "number": "a number, as 12.5",
        "share": "a share, as 0.49 or 49%",
        "increase": "an increase: 5% of the dense model's, or 0.3 more than it",
        "size": "a size: 0.6x of the dense model's, or bytes as 4GB or 900MiB",
    }
    raise RequestError(f"{option} is {text!r}, but must be {wanted[kind]}.")
