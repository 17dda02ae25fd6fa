"""What a method or a step states about itself, as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from methods import load_method, method_names
from methods.steps import load_step, step_names


def describe(name: str) -> list[dict[str, Any]]:
    """The method and the step called `name`, as far as there are such."""
    found: list[dict[str, Any]] = []
    if name in method_names():
        found.append(_facts(name, f"--method {name}", load_method(name), ""))
    if name in step_names():
        option = "--reconstruct" if name == "reconstruct" else f"--refine {name}"
        found.append(_facts(name, option, load_step(name), f"{name}."))
    return found


def _facts(name: str, option: str, owner: Any, prefix: str) -> dict[str, Any]:
    return {
        "name": name,
        "option": option,
        "summary": owner.summary,
        "needs": list(owner.needs),
        "cost": owner.cost,
        "paper": owner.paper,
        "options": [
            {"name": prefix + item.name, "default": item.default, "help": item.metadata["help"]}
            for item in dataclasses.fields(owner.options)
        ],
    }
