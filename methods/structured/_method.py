"""What every structured method states about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StructuredMethod:
    """A method that removes whole units; what it is about (`unit`) reads in a sentence: "25 % of the blocks".

    `options` is a frozen dataclass whose fields carry `metadata={"help": ...}`. `needs_text` tells from them whether a
    calibration text is read.
    """

    summary: str
    paper: str
    cost: str
    needs: tuple[str, ...]
    unit: str
    options: type
    needs_text: Callable[[Any], bool]
