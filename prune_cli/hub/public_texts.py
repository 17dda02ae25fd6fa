"""The reports of an output as others may see them: without the paths of the machine that made it."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path

from prune_cli.checkpoint.file_names import CARD, REPORT_JSON, REPORT_MARKDOWN, REPORT_PAGE
from prune_cli.report.types import Report

_TEXTS = (REPORT_JSON, REPORT_MARKDOWN, REPORT_PAGE, CARD)


def public_texts(out: Path, report: Report) -> dict[str, bytes]:
    """File name to text, of the files in `out` that tell of local paths: each path is only its last part there."""
    paths = sorted(set(local_paths(report)), key=lambda path: (-len(path), path))
    changed = {}
    for name in _TEXTS:
        if (out / name).is_file():
            text = given = (out / name).read_text(encoding="utf-8")
            for path in paths:
                for form in (str, html.escape, lambda path: json.dumps(path)[1:-1]):
                    text = text.replace(form(path), form(_last(path)))
            if text != given:
                changed[name] = text.encode()
    return changed


def local_paths(report: Report) -> Iterator[str]:
    """Every path that the report names and that holds more than a name."""
    request, model = report.request, report.model
    said = [
        request.calibration,
        request.eval,
        request.statistics,
        request.save_statistics,
        request.config,
        str(request.out),
    ]
    said += [request.allocate.removeprefix("file:"), report.output.folder]
    said += [text.source for text in (report.calibration, report.evaluation and report.evaluation.text) if text]
    if model.revision is None:
        said += [model.given, request.model]
    for path in said:
        if path and "/" in path.strip("/") and not path.startswith("hf:"):
            yield path


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
