"""What a run reads, by its sha256: recorded in its report, and held against what its recipe was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from prune_cli.checkpoint.inputs import (
    ALLOCATION_TABLE,
    CALIBRATION,
    EVALUATION,
    KEEP_LIST,
    STATISTICS_FILE,
    check_inputs,
    hash_file,
)
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.run_context import Run
from prune_cli.engine.texts import Texts
from prune_cli.report.read import read_report
from prune_cli.request.allocation import allocation_report
from prune_cli.request.request import PruneRequest

_RECIPE = "What --recipe gives"


def inputs_before(opened: OpenModel, texts: Texts, *, allocation: Mapping[str, float] | None = None) -> dict[str, str]:
    """The hashes of all that a run reads beside weights; `texts` as they were read. Raises RequestError.

    It is raised where the request's own `inputs` are others, unless it allows that.
    """
    request = opened.request
    found = {
        name: tokens.sha256
        for name, tokens in ((CALIBRATION, texts.calibration), (EVALUATION, texts.evaluation))
        if tokens is not None
    }
    if allocation is not None:
        found[ALLOCATION_TABLE] = hashlib.sha256(json.dumps(dict(sorted(allocation.items()))).encode()).hexdigest()
    if request.statistics is not None:
        found[STATISTICS_FILE] = hash_file(Path(request.statistics).expanduser())
    if request.options.get("keep_list") is not None:
        found[KEEP_LIST] = hash_file(Path(request.options["keep_list"]).expanduser())
    check_inputs(_RECIPE, _of(request, found), found, allow=request.allow_changed_inputs)
    return found


def check_weights(run: Run[OpenModel]) -> None:
    """Raise RequestError for other weights than the request's `inputs` say; the output has begun, so they are hashed.

    What was let pass is noted in the warnings of the run.
    """
    request, found, allow = run.request, all_inputs(run), run.request.allow_changed_inputs
    if (path := allocation_report(request.allocate)) is not None:
        recorded = read_report(path).report.model.files
        run.warn(*check_inputs(f"--allocate {request.allocate}", recorded, found, allow=allow))
    run.warn(*check_inputs(_RECIPE, _of(request, found), found, allow=allow))


def all_inputs(run: Run[OpenModel]) -> dict[str, str]:
    """Every input of a run that has begun: weight files by name, and the rest."""
    return {**run.output.input_hashes, **run.inputs}


def _of(request: PruneRequest, found: Mapping[str, str]) -> dict[str, str]:
    """What the request says of the kinds of inputs in `found`; a run may need fewer than the one recorded."""
    weights = any(_is_file(name) for name in found)
    return {name: sha for name, sha in request.inputs.items() if name in found or (weights and _is_file(name))}


def _is_file(name: str) -> bool:
    return name.endswith(".safetensors")
