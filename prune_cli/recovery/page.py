"""The report of a recovery as one HTML page that loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prune_cli.recovery.tables import facts, lead, sections
from prune_cli.report.html.charts import COLOURS, draw
from prune_cli.report.html.page import PAGE_FOLDER, policy_of
from prune_cli.version import __version__

if TYPE_CHECKING:
    from prune_cli.recovery.report import RecoveryReport, TrainingRun

_HERE = Path(__file__).parent
_WIDTH, _HEIGHT = 560, 260
# Title and caption of the curves.
_BLOCKS = (
    "How each block learnt",
    "The held-out error of a block behind each epoch, as a share of what it was; the table above has its first and "
    "its last.",
)
_TRAINING = ("How it learnt", "The loss that was trained, and the divergence from the teacher on held-out samples.")


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
        tables=sections(report),
        facts=facts(report),
        curves=_BLOCKS if report.training is None else _TRAINING,
        chart=Markup(_curves(report) if report.training is None else _training_curves(report.training)),
    )


def _training_curves(training: TrainingRun) -> str:
    """The loss and the held-out divergence over the tokens; both are nats where KL alone is trained."""
    data = [
        {"tokens": look.tokens, "what": what, "value": value}
        for look in training.looks
        for what, value in (("trained", look.loss), ("held out", look.held_out))
        if value is not None
    ]
    spec = {
        "width": _WIDTH,
        "height": _HEIGHT,
        "mark": {"type": "line", "point": {"size": 24, "filled": True}, "strokeWidth": 1.5},
        "encoding": {
            "x": {"field": "tokens", "type": "quantitative", "title": "tokens"},
            "y": {"field": "value", "type": "quantitative", "title": "loss"},
            "color": {
                "field": "what",
                "type": "nominal",
                "scale": {"domain": ["trained", "held out"], "range": list(COLOURS[:2])},
                "legend": {"title": None},
            },
        },
    }
    return draw(data, spec)


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
