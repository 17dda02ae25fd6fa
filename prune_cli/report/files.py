"""What is written beside the weights for people and machines: the report as JSON, Markdown and page, and the card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prune_cli.checkpoint.file_names import CARD, REPORT_JSON, REPORT_MARKDOWN, REPORT_PAGE, SOURCE_CARD
from prune_cli.report.card import card_of, read_card
from prune_cli.report.html.page import page_of
from prune_cli.report.markdown import to_markdown
from prune_cli.report.read import read_report
from prune_cli.report.task_scores import TaskScores

if TYPE_CHECKING:
    from prune_cli.report.types import Report


def report_files(report: Report, card: Path) -> dict[str, str]:
    """File name to text, for the output that `report` describes; `card` is that of the checkpoint pruned."""
    return {
        REPORT_JSON: report.to_json(),
        REPORT_MARKDOWN: to_markdown(report),
        REPORT_PAGE: page_of([report]),
        CARD: card_of(report, read_card(card)),
    }


def add_tasks(folder: Path, scores: TaskScores) -> None:
    """Write the reports and the card of a pruned model anew, with `scores`. Raises RequestError without a report."""
    report = replace(read_report(folder).report, tasks=scores)
    for name, text in report_files(report, folder / SOURCE_CARD).items():
        new = folder / f"{name}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(folder / name)
