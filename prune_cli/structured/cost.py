"""What a structured method costs before it writes, in forward passes and in words, for --dry-run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune_cli.structured.prepare import PreparedStructure


@dataclass(frozen=True)
class Pass:
    """A stage of the run, whose title begins with `title`: so many times the calibration text through all blocks.

    `heads` is how often it also comes to the output head. All layers are fitted `fits` times, on the share `fitted_on`
    of the text. `states` is how often hidden states of the whole text wait side by side. `both`: the dense model passes
    beside the smaller one.
    """

    title: str
    forwards: float
    heads: float = 0.0
    fits: float = 0.0
    fitted_on: float = 1.0
    states: float = 0.0
    both: bool = False


@dataclass(frozen=True)
class Cost:
    """What the choice takes, and the fit; `how` says what is done in them and when."""

    choice: tuple[Pass, ...]
    fit: tuple[Pass, ...]
    how: tuple[str, ...]

    @property
    def forwards(self) -> float:
        """Passes of the calibration text in all."""
        return passes_of((*self.choice, *self.fit))


def passes_of(stages: Sequence[Pass]) -> float:
    return sum(each.forwards for each in stages)


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
