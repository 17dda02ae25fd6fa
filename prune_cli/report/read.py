"""A `prune_report.json` read back: found, its version checked, every field held against the schema. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_cli.checkpoint.file_names import REPORT_JSON
from prune_cli.errors import RequestError
from prune_cli.report.schema import report_schema
from prune_cli.report.types import SCHEMA_VERSION, Report

_LONGEST = 120


@dataclass(frozen=True)
class SavedReport:
    """What the file `path` holds."""

    path: Path
    report: Report


def read_report(given: str | Path) -> SavedReport:
    """The report in the file `given`, or in the folder of a pruned model.

    Raises RequestError where there is none, or one of another version, or one that does not fit the schema.
    """
    path = report_file(given)
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}): give a prune_report.json.") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no JSON ({error}): give the prune_report.json of a pruned model.") from error
    _check(path, document)
    return SavedReport(path, Report.from_json(document))


def report_file(given: str | Path) -> Path:
    """Where the report of `given`, a report or the folder of a pruned model, must lie; raises RequestError."""
    path = Path(given).expanduser()
    if path.is_dir():
        if not (path / REPORT_JSON).is_file():
            raise RequestError(
                f"{path} has no {REPORT_JSON}: give a folder that prune-cli prune wrote, or the report itself."
            )
        return path / REPORT_JSON
    if not path.is_file():
        raise RequestError(f"{path} is not there: give a {REPORT_JSON}, or the folder of a pruned model.")
    return path


def _no_number(text: str) -> float:
    raise ValueError(f"it holds {text}")


def _check(path: Path, document: Any) -> None:
    if not isinstance(document, dict) or "schema_version" not in document or "tool" not in document:
        raise RequestError(f"{path} is no report of prune-cli: give the {REPORT_JSON} of a pruned model.")
    version = document["schema_version"]
    if version != SCHEMA_VERSION:
        raise RequestError(
            f"{path} has schema_version {version!r}, but this prune-cli reads {SCHEMA_VERSION}: use the version that "
            "wrote it, or prune again."
        )
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(report_schema()).iter_errors(document))
    if error is not None:
        told = error.message if len(error.message) <= _LONGEST else error.message[:_LONGEST] + "..."
        raise RequestError(
            f"{path} is no valid report: {error.json_path.removeprefix('$.')}: {told}; it was edited, or written by "
            "another version."
        )
