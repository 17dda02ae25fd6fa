"""Named combinations of method, steps and target; their measured quality is in the README's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_cli.errors import RequestError, did_you_mean

_BEST = {"method": "admm", "target": "dense", "self_calibration": "auto", "allocate": "auto"}
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "wanda"},
    "balanced": {"method": "admm"},
    "best": _BEST,
    "max": {**_BEST, "match_blocks": True},
}


# What each does, for people.
SUMMARIES = {
    "fast": "Wanda: a score of weight times input decides what goes; what stays is not changed.",
    "balanced": "ADMM: for each linear layer, mask and kept weights are solved for together.",
    "best": "ADMM towards the outputs of the dense model (--target dense); layers give what their blocks' outputs bear "
    "(--allocate auto), and where tokens are few, the model samples more by itself (--self-calibration auto).",
    "max": "best, then each pruned block is trained against the dense one while it is in memory (--match-blocks).",
}

# What the presets cost beyond their methods.
COSTS = {
    "fast": "",
    "balanced": "",
    "best": "; the dense model beside; of few tokens up to four times as many, and a forward pass to sample them",
    "max": "; as best, and then some epochs of training for each block",
}


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` options, those that are None left out, over those of the preset among them.

    Raises RequestError for a preset that does not exist.
    """
    explicit = {name: value for name, value in given.items() if value is not None}
    preset = explicit.get("preset")
    if preset is not None and preset not in PRESETS:
        raise RequestError(
            f"--preset is {preset!r}: choose one of {', '.join(PRESETS)}{did_you_mean(preset, PRESETS)}."
        )
    return {**PRESETS.get(preset or "", {}), **explicit}
