"""What a request says of tensors by their names, and the sentences that refuse it. No torch here."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from prune_cli.errors import RequestError
from prune_cli.request.request import PruneRequest


def check_globs(names: Collection[str], request: PruneRequest) -> None:
    """Raise RequestError for a glob of --include or --exclude that matches none of the checkpoint's `names`."""
    for option, globs in (("--include", request.include), ("--exclude", request.exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise RequestError(
                    f"{option} {glob!r} matches no tensor: prune-cli inspect {request.model} lists the names."
                )


def check_fits(name: str, inputs: int, pattern: tuple[int, int]) -> None:
    """Raise RequestError where the inputs of a linear layer are no multiple of M."""
    keep, of = pattern
    if inputs % of:
        raise RequestError(
            f"{name} has {inputs} inputs, no multiple of {of}, so {keep}:{of} does not fit: "
            f"add --exclude {name!r} or use --sparsity."
        )
