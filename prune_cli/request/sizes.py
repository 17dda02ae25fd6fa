"""Sizes as they are typed: 20GB, 900MiB."""

from __future__ import annotations

import re

from prune_cli.errors import RequestError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# A number, and the unit of a size behind it.
NUMBER, UNIT = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)", r"[kMGT]?i?B"
_SIZE = re.compile(rf"{NUMBER}\s*({UNIT})", re.IGNORECASE)


def bytes_of(unit: str) -> int:
    """Of `unit`, however it is written: GB is 10^9, GiB 2^30."""
    return _UNITS[unit.lower()]


def parse_size(option: str, text: str) -> int:
    """Bytes. Raises RequestError for what is no size, and for none at all."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * bytes_of(found[2])) if found else 0
    if not size:
        raise RequestError(f"{option} is {text!r}, but must be a size with its unit, as 20GB or 900MiB.")
    return size
