"""What a method, a step or an allocation states about itself, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from methods import load_method, method_names
from methods.steps import load_step, step_names
from methods.structured import load_structured, structured_names
from prune_cli.request.allocation import STRATEGIES


def describe(name: str) -> list[dict[str, Any]]:
    """The method, the step and the allocation called `name`, as far as there are such."""
    found: list[dict[str, Any]] = []
    if name in method_names():
        found.append(_facts(name, f"--method {name}", load_method(name), load_method(name).needs, ""))
    if name in structured_names():
        found.append(_facts(name, f"--method {name}", load_structured(name), load_structured(name).needs, ""))
    if name in step_names():
        option = "--reconstruct" if name == "reconstruct" else f"--refine {name}"
        found.append(_facts(name, option, load_step(name), load_step(name).needs, f"{name}."))
    if name in STRATEGIES:
        strategy = STRATEGIES[name]
        needs = ["one look at the dense model's inputs"] if strategy.needs_text else []
        found.append(_facts(name, f"--allocate {name}", strategy, needs, f"{name}."))
    return found


def _facts(name: str, option: str, owner: Any, needs: Sequence[str], prefix: str) -> dict[str, Any]:
    return {
        "name": name,
        "option": option,
        "summary": owner.summary,
        "needs": list(needs),
        "cost": owner.cost,
        "paper": owner.paper,
        "options": [
            {"name": prefix + item.name, "default": item.default, "help": item.metadata["help"]}
            for item in dataclasses.fields(owner.options)
        ],
    }
