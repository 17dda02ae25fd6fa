"""The JSON Schema of reports, derived from `Report`. No torch here.

`python -m prune_cli.report.schema` prints what report.schema.json holds for those who read it without us.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from prune_cli.report.types import SCHEMA_VERSION, Report
from prune_cli.request.json_schema import schema_of
from prune_cli.request.schema import request_schema


@cache
def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every report satisfies."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"prune_report-{SCHEMA_VERSION}",
        "title": f"prune_report.json of prune-cli, schema version {SCHEMA_VERSION}",
        **schema_of(Report),
    }
    schema["properties"]["request"] = request_schema()
    return schema


def schema_text() -> str:
    return json.dumps(report_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
