"""What the user said, from the command line and a recipe, as the fields of a PruneRequest."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from prune_cli.checkpoint.inputs import ALLOCATION_TABLE, CALIBRATION, EVALUATION, STATISTICS_FILE
from prune_cli.commands.options import batch_size_of, eval_windows_of, key_values, self_calibration_of
from prune_cli.errors import RequestError
from prune_cli.request.presets import PRESETS, with_preset
from prune_cli.request.request import PruneRequest

# Parameters of the command that are named or typed otherwise than the fields.
_FIELDS = {"option": "options", "evaluation": "eval", "into": "format"}
_READ = {
    "options": key_values,
    "batch_size": batch_size_of,
    "eval_windows": eval_windows_of,
    "self_calibration": self_calibration_of,
    "include": tuple,
    "exclude": tuple,
    "out": Path,
}


# Another value of these asks for other inputs than a recipe's hashes are of.
_INPUTS_OF = {
    "calibration": (CALIBRATION,),
    "samples": (CALIBRATION,),
    "seed": (CALIBRATION, EVALUATION),
    "seq_len": (CALIBRATION, EVALUATION),
    "eval": (EVALUATION,),
    "eval_windows": (EVALUATION,),
    "allocate": (ALLOCATION_TABLE,),
    "statistics": (STATISTICS_FILE,),
}


def explicit_options(context: typer.Context) -> dict[str, Any]:
    """The fields of PruneRequest that stand on the command line itself; defaults are not among them."""
    fields = {item.name for item in dataclasses.fields(PruneRequest)}
    explicit: dict[str, Any] = {}
    for parameter, value in context.params.items():
        name = _FIELDS.get(parameter, parameter)
        source = context.get_parameter_source(parameter)
        if name in fields and value is not None and source is not None and source.name == "COMMANDLINE":
            explicit[name] = _READ.get(name, lambda given: given)(value)
    return explicit


def merged(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of a config, a recipe and the command line, the later over the earlier.

    Raises RequestError for an unknown preset and where MODEL or OUT is said nowhere.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values = _over(values, layer)
    for name in ("model", "out"):
        if name not in values:
            raise RequestError(f"{name.upper()} is missing: give it on the command line, or as {name} in a recipe.")
    return values


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`: of a table key by key, and what excludes something replaces it."""
    below, above = dict(lower), dict(upper)
    if "model" in above and "out" not in above and "model" in below:
        above["out"] = Path(above.pop("model"))  # a lone argument beside a recipe that names the model
    if "preset" in above:
        old = PRESETS.get(below.pop("preset", ""), {})
        below = {name: value for name, value in below.items() if name not in old or old[name] != value}
    other = {name for name in above.keys() & below.keys() if above[name] != below[name]}
    other |= _INPUTS_OF.keys() & above.keys() - below.keys()
    if "model" in other:
        below.pop("revision", None)  # it pins the recipe's own model
    if "inputs" in below:
        below["inputs"] = _inputs_left(below["inputs"], other)
    for name, other in (("pattern", "sparsity"), ("sparsity", "pattern")):
        if name in above and other not in above:
            below.pop(other, None)
    if "options" in above:
        above["options"] = {**below.get("options", {}), **above["options"]}
    return with_preset(below) | with_preset(above)


def _inputs_left(inputs: Mapping[str, str], other: Collection[str]) -> dict[str, str]:
    """The hashes of a recipe that still hold where the fields `other` are said otherwise."""
    if {"model", "revision"} & set(other):
        return {}
    asked_for = {name for field in other for name in _INPUTS_OF.get(field, ())}
    return {name: sha256 for name, sha256 in inputs.items() if name not in asked_for}
