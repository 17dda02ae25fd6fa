"""`prune-cli inspect`."""

from __future__ import annotations

from prune_cli.commands.error_handling import told_failures
from prune_cli.commands.options import Json, Model, Revision, Verbose, print_result


def inspect(
    model: Model,
    revision: Revision = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Per tensor: shape, dtype, zeros and the N:M pattern found; totals of embeddings, blocks and head."""
    with told_failures(as_json=as_json, verbose=verbose):
        from prune_cli.checks.inspection import inspect_model
        from prune_cli.commands.terminal import show_inspection

        inspection = inspect_model(model, revision)
        print_result(
            inspection.to_json(),
            as_json=as_json,
            quiet=False,
            show=lambda console: show_inspection(console, inspection),
        )
