"""What is written beside the recovered weights: the report as JSON, Markdown and page, and the card. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from prune_cli.checkpoint.file_names import CARD, RECOVER_JSON, RECOVER_MARKDOWN, RECOVER_PAGE, SOURCE_CARD
from prune_cli.recovery.page import page_of
from prune_cli.recovery.tables import BLOCKS, facts, lead, sections
from prune_cli.report.card import inherited, read_card
from prune_cli.report.format import table

if TYPE_CHECKING:
    from prune_cli.recovery.report import RecoveryReport

_ERRORS = (
    "Errors are ‖B − y‖² / ‖y‖² on held-out samples: B is what a block returns, y the state of the teacher behind the "
    "blocks beside it.\n\n"
)


def recovery_files(report: RecoveryReport, source: Path) -> dict[str, str]:
    """File name to text, for the output that `report` describes; `source` is the folder of the pruned model."""
    markdown = to_markdown(report)
    return {
        RECOVER_JSON: report.to_json(),
        RECOVER_MARKDOWN: markdown,
        RECOVER_PAGE: page_of(report),
        CARD: _card(source, markdown),
    }


def to_markdown(report: RecoveryReport) -> str:
    warnings = "".join(f"\n\n**Warning:** {warning}" for warning in report.warnings)
    kept = [(tensor.name, tensor.reason) for tensor in report.tensors if tensor.action == "kept"]
    parts = [
        f"# {report.model.name}, recovered\n\n{lead(report)}{warnings}",
        *[
            f"## {title}\n\n{_ERRORS if title == BLOCKS else ''}" + table(header, rows)
            for title, header, rows in sections(report)
        ],
        "## How\n\n" + table(("", ""), facts(report)),
        "## Kept tensors\n\n" + table(("tensor", "why"), ((f"`{name}`", why) for name, why in kept)),
    ]
    return "\n\n".join(parts) + "\n"


def _card(source: Path, markdown: str) -> str:
    """What the model's card says of licence and languages stays true; the card itself lies beside this one."""
    card = read_card(source / CARD)
    data = {**inherited(card.metadata), "library_name": "transformers", "tags": ["pruned", "recovered", "prune-cli"]}
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    before = f"\n\nThe card of the pruned model is in {SOURCE_CARD}." if card.there else ""
    return f"---\n{front}---\n\n{markdown.rstrip()}{before}\n"
