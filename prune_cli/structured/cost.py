"""What a structured method costs before it writes, in forward passes and in words, for --dry-run."""

from __future__ import annotations

from dataclasses import dataclass

from prune_cli.structured.prepare import PreparedStructure


@dataclass(frozen=True)
class Cost:
    """Passes of the calibration text that the choice takes, and the fit; `how` says what is done in them and when."""

    choice: float
    fit: float
    how: tuple[str, ...]


def how_chosen(prepared: PreparedStructure, choice: float, text: str) -> tuple[str, ...]:
    """Of a method that chooses before it writes; `text` is "" or " of N tokens"."""
    unit = prepared.method.unit
    if not choice:
        return (f"The {unit} are named or drawn, so nothing is measured.",)
    return (f"The {unit} are chosen first, which costs about {choice:.1f} forward passes{text}.",)


def how_known(prepared: PreparedStructure) -> tuple[str, ...]:
    """What --statistics saves."""
    if prepared.request.statistics is None:
        return ()
    return ("What --statistics holds is not measured again.",)
