"""A `recover_report.json` read back, every field held against the schema. No torch here."""

from __future__ import annotations

import json
from pathlib import Path

from prune_cli.errors import RequestError
from prune_cli.recovery.report import SCHEMA_VERSION, RecoveryReport, recovery_schema

_LONGEST = 120


def read_recovery(path: Path) -> RecoveryReport:
    """Raises RequestError where the file is no such report, or one of another version."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as JSON ({error}): recover again.") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise RequestError(
            f"{path} has schema_version {version!r}, but this prune-cli reads {SCHEMA_VERSION}: use the version that "
            "wrote it, or recover again."
        )
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(recovery_schema()).iter_errors(document))
    if error is not None:
        told = error.message if len(error.message) <= _LONGEST else error.message[:_LONGEST] + "..."
        raise RequestError(f"{path} is no valid report: {error.json_path.removeprefix('$.')}: {told}; it was edited.")
    return RecoveryReport.from_json(document)
