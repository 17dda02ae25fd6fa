"""What a structured method does with a model, and which there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prune_cli.engine.run_context import Run
from prune_cli.errors import RequestError
from prune_cli.structured.cost import Cost
from prune_cli.structured.depth.choose import DepthRemoval
from prune_cli.structured.moe.choose import ExpertRemoval
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure
from prune_cli.structured.width.narrow import WidthRemoval


class Removal(Protocol):
    """One method on one model. Making it raises RequestError where the request cannot be met, before any work."""

    def asked(self) -> str:
        """What was asked for, in words."""
        ...

    def example(self) -> StructuredPlan:
        """A plan of the size that was asked for, where which units go is still to be chosen."""
        ...

    def cost(self, text: str) -> Cost:
        """What choice and fit cost; `text` is "" or " of N tokens"."""
        ...

    def bytes_at_most(self) -> int:
        """Of the output's files."""
        ...

    def decide(self, run: Run[PreparedStructure]) -> StructuredPlan:
        """What the output holds; measured once, also when the run is resumed. The output is laid out by it."""
        ...

    def write(self, run: Run[PreparedStructure], change: StructuredPlan) -> StructuredPlan:
        """Write the tensors of `change` that get new values, block by block; returns it with what was found."""
        ...


# The names are those of `methods.structured.structured_names()`.
REMOVALS: dict[str, Callable[[PreparedStructure], Removal]] = {
    "depth": DepthRemoval,
    "width": WidthRemoval,
    "experts": ExpertRemoval,
}


def removal_of(prepared: PreparedStructure) -> Removal:
    """The method that was asked for, checked. Raises RequestError."""
    name = prepared.request.method
    if name not in REMOVALS:
        raise RequestError(f"--method {name} removes no units of a model: choose one of {', '.join(REMOVALS)}.")
    return REMOVALS[name](prepared)
