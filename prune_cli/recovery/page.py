"""The report of a recovery as one HTML page that loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prune_cli.recovery.tables import BLOCK_HEADER, LOSS_HEADER, block_rows, facts, lead, loss_rows
from prune_cli.report.html.charts import COLOURS, draw
from prune_cli.report.html.page import PAGE_FOLDER, policy_of
from prune_cli.version import __version__

if TYPE_CHECKING:
    from prune_cli.recovery.report import RecoveryReport

_HERE = Path(__file__).parent
_WIDTH, _HEIGHT = 560, 260


def page_of(report: RecoveryReport) -> str:
    """The same report gives the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = (PAGE_FOLDER / "page.css").read_text("utf-8")
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        policy=policy_of(style),
        version=__version__,
        title=f"{report.model.name}, recovered",
        lead=lead(report),
        warnings=report.warnings,
        tables=[
            ("Loss", LOSS_HEADER, loss_rows(report)),
            ("Blocks", BLOCK_HEADER, block_rows(report)),
        ],
        facts=facts(report),
        chart=Markup(_curves(report)),
    )


def _curves(report: RecoveryReport) -> str:
    """The error of every block over its epochs, as a share of what it was."""
    data = [
        {"epoch": epoch, "block": str(block.block), "share": error / block.error_before}
        for block in report.blocks
        if block.error_before
        for epoch, error in enumerate((block.error_before, *block.epochs))
    ]
    names = [str(block.block) for block in report.blocks]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
    whole = {"tickMinStep": 1, "format": "d"}
    spec = {
        "width": _WIDTH,
        "height": _HEIGHT,
        "mark": {"type": "line", "point": {"size": 24, "filled": True}, "strokeWidth": 1.5},
        "encoding": {
            "x": {"field": "epoch", "type": "quantitative", "title": "epoch", "axis": whole},
            "y": {"field": "share", "type": "quantitative", "title": "held-out error, share of the first"},
            "color": {
                "field": "block",
                "type": "nominal",
                "scale": {"domain": names, "range": colours},
                "legend": {"title": "block", "columns": 2},
            },
        },
    }
    return draw(data, spec)
