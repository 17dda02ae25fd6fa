"""The JSON Schema of a request, derived from `PruneRequest`: one for recipes, reports and --json. No torch here."""

from __future__ import annotations

from functools import cache
from typing import Any

from prune_cli.request.json_schema import schema_of
from prune_cli.request.request import PruneRequest


@cache
def request_schema() -> dict[str, Any]:
    """Every option of a run as a property; null means that the user did not say."""
    explicit = "Every option of the run, named like the command line's; null means that the user did not say."
    return schema_of(PruneRequest) | {"description": explicit}
