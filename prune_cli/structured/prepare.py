"""Everything of a structured run that is settled before any weight is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from methods.structured import load_structured
from methods.structured._method import StructuredMethod
from prune_cli.engine.open_model import OpenModel, open_model
from prune_cli.errors import RequestError
from prune_cli.model.tensor_info import unknown_in_blocks
from prune_cli.packed.output import keeps_packed
from prune_cli.ranks.ranks import ALONE, Ranks
from prune_cli.request.request import PruneRequest


@dataclass(frozen=True)
class PreparedStructure(OpenModel):
    """A checked request for a structured method, with the options it was given."""

    method: StructuredMethod
    options: Any


def prepare_structured(request: PruneRequest, *, writes: bool = True, ranks: Ranks = ALONE) -> PreparedStructure:
    """Check all that can be checked without weights; raises as `open_model` does."""
    request.check()
    method = load_structured(request.method)
    options = request.structured_options()
    opened = open_model(request, writes=writes, ranks=ranks)
    unknown = unknown_in_blocks(opened.model.tensor_map)
    if unknown and not request.allow_unsupported:
        raise RequestError(
            f"{request.model} has {len(unknown)} tensors unknown to the model (the first is {unknown[0]}): "
            "add --allow-unsupported to keep them as they are."
        )
    if keeps_packed(opened.checkpoint) and getattr(options, "fits", False):
        options = replace(options, refit="none")  # which would give what stays new values
    return PreparedStructure(**vars(opened), method=method, options=options)


_DEFAULT = 0.25


def asked_share(request: PruneRequest, unit: str) -> float:
    """Raises RequestError for a share of no units."""
    share = _DEFAULT if request.sparsity is None else request.sparsity
    if not share:
        raise RequestError(f"--sparsity 0 removes no {unit}: give a share of the {unit}s above 0.")
    return share


def refuse_both(request: PruneRequest, option: str, given: object) -> None:
    """Raise RequestError where an option that counts units comes with --sparsity."""
    if given is not None and request.sparsity is not None:
        raise RequestError(f"--sparsity and -o {option}= exclude each other: give one of them.")
