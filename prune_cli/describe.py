"""What a method states about itself, as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from methods import load_method


def describe_method(name: str) -> dict[str, Any]:
    """Everything a method states about itself, as plain values."""
    method = load_method(name)
    return {
        "name": name,
        "summary": method.summary,
        "needs": list(method.needs),
        "cost": method.cost,
        "paper": method.paper,
        "options": [
            {"name": item.name, "default": item.default, "help": item.metadata["help"]}
            for item in dataclasses.fields(method.options)
        ],
    }
