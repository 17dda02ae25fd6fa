"""Everything of a structured run that is settled before any weight is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from methods.structured import load_structured
from methods.structured._method import StructuredMethod
from prune_cli.errors import RequestError
from prune_cli.packed.output import keeps_packed
from prune_cli.prepare import Opened, open_model
from prune_cli.request import PruneRequest


@dataclass(frozen=True)
class StructuredJob(Opened):
    """A checked request for a structured method, with the options it was given."""

    method: StructuredMethod
    options: Any


def prepare_structured(request: PruneRequest, *, writes: bool = True) -> StructuredJob:
    """Check all that can be checked without weights; raises as `open_model` does."""
    request.check()
    method = load_structured(request.method)
    options = request.structured_options()
    needs_text = method.needs_text(options) or request.calibration is not None
    opened = open_model(request, needs_text=needs_text, writes=writes)
    unknown = [name for name, place in opened.model.places.items() if place.role == "unknown"]
    if unknown and not request.allow_unsupported:
        raise RequestError(
            f"{request.model} has {len(unknown)} tensors unknown to the model (the first is {unknown[0]}): "
            "add --allow-unsupported to keep them as they are."
        )
    if keeps_packed(opened.checkpoint) and getattr(options, "fits", False):
        options = replace(options, refit="none")  # which would give what stays new values
    return StructuredJob(**vars(opened), method=method, options=options)
