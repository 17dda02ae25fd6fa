"""Reports that an earlier version wrote are still read, whatever shows them."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prune_cli.commands.terminal import show_report
from prune_cli.report.card import SourceCard, card_of
from prune_cli.report.html.page import page_of
from prune_cli.report.markdown import to_markdown
from prune_cli.report.read import read_report
from prune_cli.report.schema import schema_text
from prune_cli.report.types import Report

STORED = sorted((Path(__file__).parent / "reports").glob("*.json"))


def renderings(report: Report) -> dict[str, str]:
    console = Console(width=200, record=True, file=StringIO())
    show_report(console, report, verbose=True)
    return {
        "terminal": console.export_text(),
        "Markdown": to_markdown(report),
        "page": page_of([report]),
        "card": card_of(report, SourceCard(False, {})),
    }


def without_new_fields(written: Any, stored: Any) -> Any:
    """`written` with only the keys that `stored` has."""
    if isinstance(stored, dict):
        assert stored.keys() <= written.keys()
        return {key: without_new_fields(written[key], value) for key, value in stored.items()}
    if isinstance(stored, list):
        return [without_new_fields(w, s) for w, s in zip(written, stored, strict=True)]
    return written


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_nothing_of_a_stored_report_is_lost(path: Path) -> None:
    stored = json.loads(path.read_text())
    report = read_report(path).report
    assert without_new_fields(json.loads(report.to_json()), stored) == stored
    assert Report.from_json(json.loads(report.to_json())) == report


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_report_is_shown_everywhere(path: Path) -> None:
    report = read_report(path).report
    for name, text in renderings(report).items():
        assert report.method.name in text, name
        assert report.gain[:20] in text, name
        if report.evaluation is not None:
            assert f"{report.evaluation.after.perplexity:.2f}"[:-1] in text, name


def test_the_schema_in_the_repository_is_the_derived_one() -> None:
    """`python -m prune_cli.report.schema > prune_cli/report/report.schema.json` makes it so."""
    file = Path(__file__).parent.parent / "prune_cli" / "report" / "report.schema.json"
    assert file.read_text(encoding="utf-8") == schema_text()
