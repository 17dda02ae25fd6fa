"""What is written beside the weights for people and machines: the report as JSON, Markdown and page, and the card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prune_cli.checkpoint.file_names import CARD, REPORT_JSON, REPORT_MARKDOWN, REPORT_PAGE
from prune_cli.report.card import card_of, read_card
from prune_cli.report.html.page import page_of
from prune_cli.report.markdown import to_markdown

if TYPE_CHECKING:
    from prune_cli.report.types import Report


def report_files(report: Report, source: Path) -> dict[str, str]:
    """File name to text, for the output that `report` describes; `source` is the folder of the checkpoint pruned."""
    return {
        REPORT_JSON: report.to_json(),
        REPORT_MARKDOWN: to_markdown(report),
        REPORT_PAGE: page_of([report]),
        CARD: card_of(report, read_card(source / CARD)),
    }
