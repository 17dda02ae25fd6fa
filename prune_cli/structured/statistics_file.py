"""Statistics of the dense model in a file, so that several runs (as five ratios) need one pass.

A file is safetensors; its metadata holds what identifies the model and the text, and facts that are no tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prune_cli.checkpoint.inputs import CALIBRATION, check_inputs
from prune_cli.checkpoint.whole_file import NOT_WRITTEN, save_whole
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.run_context import Run
from prune_cli.errors import PruneError, RequestError
from prune_cli.request.request import PruneRequest

_KEY = "prune-cli statistics"
_VERSION = 1
# Statistics of one method, or in one precision, are not those of another.
_STRICT = ("method", "dtype of the forward pass")


@dataclass(frozen=True)
class Statistics:
    """What one method measured: `tensors` by name, and `facts` that JSON can hold."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def identity(run: Run[OpenModel]) -> dict[str, Any]:
    """What statistics depend on; the output has begun, so the model's files are hashed."""
    calibration = run.texts.calibration
    return {
        "method": run.request.method,
        "model files": dict(run.output.input_hashes),
        "calibration text": calibration.sha256 if calibration else None,
        "dtype of the forward pass": str(run.plan.dtype),
    }


def check_statistics(request: PruneRequest, useless: str | None) -> None:
    """Raise RequestError before any work for files that cannot be used, or any with what `useless` says."""
    if request.statistics is None and request.save_statistics is None:
        return
    if useless is not None:
        raise RequestError(f"--statistics and --save-statistics have no use with {useless}: leave them out.")
    _check_paths(request.statistics, request.save_statistics, replace=request.resume or request.overwrite)


def measured(run: Run[OpenModel], measure: Callable[[Statistics], Statistics]) -> Statistics:
    """What `measure` makes of the statistics in --statistics; both are kept in --save-statistics."""
    request, measured_with = run.request, identity(run)
    known = Statistics()
    if request.statistics is not None:
        known, warnings = read_statistics(request.statistics, measured_with, allow=request.allow_changed_inputs)
        run.warn(*warnings)
    found = measure(known)
    if request.save_statistics is not None and run.ranks.first:
        everything = Statistics({**known.tensors, **found.tensors}, {**known.facts, **found.facts})
        write_statistics(request.save_statistics, measured_with, everything)
    return found


def _check_paths(read: str | None, written: str | None, *, replace: bool) -> None:
    """Raise RequestError before any work for a file to read that is not there, or one to write that cannot be."""
    if read is not None and not Path(read).expanduser().is_file():
        raise RequestError(f"--statistics {read} is not there: make it with --save-statistics.")
    if written is not None:
        path = Path(written).expanduser()
        if path.exists() and not replace:
            raise RequestError(f"--save-statistics {written} exists already: choose another file, or read it instead.")
        if not path.parent.is_dir():
            raise RequestError(f"--save-statistics {written}: there is no folder {path.parent}.")


def read_statistics(
    given: str, expected: Mapping[str, Any], *, allow: bool = False
) -> tuple[Statistics, tuple[str, ...]]:
    """Those of `given`, and warnings; raises RequestError unless they were measured for the same method.

    The same holds for model and text, unless `allow`, which makes a warning of it.
    """
    path = Path(given).expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise RequestError(f"--statistics {given} cannot be read ({error}): make it with --save-statistics.") from error
    if not isinstance(head, dict) or head.get("version") != _VERSION:
        raise RequestError(f"--statistics {given} was not written by --save-statistics of this version: make it anew.")
    found = head["identity"]
    differs = [name for name in _STRICT if found.get(name) != expected[name]]
    if differs:
        raise RequestError(
            f"--statistics {given} was measured with another {differs[0]}: repeat the options of the run that wrote "
            "it, or measure again with --save-statistics."
        )
    warnings = check_inputs(f"--statistics {given}", _hashes(found), _hashes(expected), allow=allow)
    return Statistics(tensors, head["facts"]), warnings


def _hashes(measured_with: Mapping[str, Any]) -> dict[str, str]:
    text = measured_with["calibration text"]
    return {**measured_with["model files"], **({CALIBRATION: text} if text is not None else {})}


def write_statistics(given: str, measured_with: Mapping[str, Any], statistics: Statistics) -> None:
    """Write `given` in one rename. Raises PruneError where it cannot be written."""
    path = Path(given).expanduser()
    head = {"version": _VERSION, "identity": dict(measured_with), "facts": dict(statistics.facts)}
    try:
        save_whole(path, statistics.tensors, _KEY, head)
    except NOT_WRITTEN as error:
        raise PruneError(f"--save-statistics {given} cannot be written ({error}): choose another file.") from error
