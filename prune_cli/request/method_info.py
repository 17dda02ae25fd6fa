"""What a method, a step or an allocation states about itself, as plain values."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import methods
from methods import load_method, method_names
from methods.steps import load_step, step_names
from methods.structured import load_structured, structured_names
from prune_cli.request.allocation import STRATEGIES
from prune_cli.request.presets import COSTS, PRESETS, SUMMARIES


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


def summaries(folder: Sequence[str], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, summary and cost of each file of a package of methods, read from its text: without importing torch."""
    found = []
    for name in names:
        path = Path(methods.__file__).parent.joinpath(*folder, f"{name}.py")
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        explicit = [{word.arg: word.value for word in call.keywords} for call in calls]
        own = next(words for words in explicit if {"summary", "paper", "cost"} <= words.keys())
        found.append((name, str(ast.literal_eval(own["summary"])), str(ast.literal_eval(own["cost"]))))
    return found


def choices() -> dict[str, list[tuple[str, str, str]]]:
    """Everything that --preset, --method, steps and --allocate take: name, what it does, what it costs."""
    of_methods = summaries((), method_names())
    costs = {name: cost for name, _, cost in of_methods}
    return {
        "Presets (--preset)": [
            (name, SUMMARIES[name], costs[fields["method"]] + COSTS[name]) for name, fields in PRESETS.items()
        ],
        "Methods for sparse weights (--method)": of_methods,
        "Methods for smaller models (--method)": summaries(("structured",), structured_names()),
        "Steps after a method (--refine, --reconstruct)": summaries(("steps",), step_names()),
        "Allocations (--allocate)": [(name, each.summary, each.cost) for name, each in STRATEGIES.items()],
    }


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
