"""What --sparsity asks of a structured method: a share of its units."""

from __future__ import annotations

from prune_cli.errors import RequestError
from prune_cli.request.request import PruneRequest

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
