"""The JSON Schema of reports: report.schema.json, with the request as `PruneRequest` has it. No torch here."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from prune_cli.request.schema import request_schema

SCHEMA_VERSION = 1


@cache
def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every report satisfies."""
    schema = json.loads(resources.files("prune_cli.report").joinpath("report.schema.json").read_text(encoding="utf-8"))
    schema["properties"]["request"] = request_schema()
    return schema
