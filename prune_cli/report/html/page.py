"""Reports to the text of the page: the template filled, everything inlined, the policy that shuts the network out."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from prune_cli.report.html.charts import OUTPUT_ERROR, SCORE, SPARSITY, Chart, by_block, charts_of, is_flat
from prune_cli.report.html.choices import chart_of_choice, chart_of_sizes
from prune_cli.report.html.summary import labels_of, remarks_on, side_by_side, tell
from prune_cli.report.html.tensor_table import points_of, rows_of, scores_of
from prune_cli.report.tasks import RECOVERY
from prune_cli.version import __version__

if TYPE_CHECKING:
    from jinja2 import Template

    from prune_cli.report.types import Report

PAGE_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Measured:
    """One quantity's charts, or the sentence that says why there is none."""

    title: str
    explanation: str
    charts: Sequence[Chart]


def page_of(reports: Sequence[Report]) -> str:
    """One HTML document of one or several reports; the same reports give the same text."""
    from markupsafe import Markup

    style, script = (PAGE_FOLDER / "page.css").read_text("utf-8"), (PAGE_FOLDER / "page.js").read_text("utf-8")
    labels = labels_of(reports)
    rows = rows_of(reports)
    runs = [tell(report, label) for report, label in zip(reports, labels, strict=True)]
    return _template().render(
        style=Markup(style),
        script=Markup(script),
        policy=policy_of(style, script),
        version=__version__,
        runs=runs,
        compared=side_by_side(runs),
        remarks=remarks_on(reports),
        measured=[*_sizes(reports, labels), *_scores(reports, labels), *_of_sparse_maps(reports, labels)],
        rows=rows,
        actions=[action for action in ("narrowed", "refitted", "removed") if any(action in row.action for row in rows)],
        recovery=RECOVERY,
        safe=Markup,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def policy_of(style: str, script: str | None = None) -> str:
    """Nothing is loaded from anywhere, and nothing runs but these very texts."""
    runs = "'none'" if script is None else f"'{_hash(script)}'"
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src {runs}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _sizes(reports: Sequence[Report], labels: Sequence[str]) -> list[Measured]:
    """Of several runs, what each is worth; nothing where their losses cannot be compared."""
    chart = chart_of_sizes(reports, labels)
    told = "What a run saves on disk and what it costs."
    return [] if chart is None else [Measured(chart.title, told, [chart])]


def _scores(reports: Sequence[Report], labels: Sequence[str]) -> list[Measured]:
    """A chart for each structured run: their scores are in units of their own."""
    charts: list[Chart] = []
    for report, label in zip(reports, labels, strict=True):
        chosen, points = chart_of_choice(report), scores_of(report, label)
        if chosen is not None:
            charts.append(chosen if len(reports) == 1 else replace(chosen, title=f"{chosen.title} in {label}"))
        elif points:
            quantity = SCORE if len(reports) == 1 else replace(SCORE, title=f"score in {label}")
            charts.append(by_block(points, quantity, "kind", "Each kind of score, block by block."))
    told = "What the method judged each block by; the table above has all scores and says what came of it."
    return [Measured("Scores", told, charts)] if charts else []


def _of_sparse_maps(reports: Sequence[Report], labels: Sequence[str]) -> list[Measured]:
    """Nothing for models that are only smaller."""
    sparse = any(report.structure is None or report.totals.pruned_parameters for report in reports)
    return [_sparsity(reports, labels), _error(reports, labels)] if sparse else []


def _sparsity(reports: Sequence[Report], labels: Sequence[str]) -> Measured:
    points = points_of(reports, labels, "sparsity")
    title = "Sparsity"
    if not points:
        return Measured(title, "No tensor was made sparse.", [])
    if is_flat(points):
        told = SPARSITY.text(sum(point.value for point in points) / len(points))
        return Measured(title, f"Every pruned tensor is equally sparse: {told} of each is zero, in all blocks.", [])
    told = "The share of zeros in the pruned tensors, counted in the written files."
    return Measured(title, told, charts_of(points, SPARSITY, several=len(reports) > 1))


def _error(reports: Sequence[Report], labels: Sequence[str]) -> Measured:
    points = points_of(reports, labels, "output_error")
    title = "Output error"
    if not points:
        blind = all(report.calibration is None for report in reports)
        why = "without calibration text there are no inputs to measure it on" if blind else "no sparse layer has one"
        return Measured(title, f"Not measured: {why}.", [])
    told = (
        "How far the outputs of a layer are from those of the dense one on the same inputs, ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖²: "
        "0 is no difference, 1 as if the whole layer were zero."
    )
    return Measured(title, told, charts_of(points, OUTPUT_ERROR, several=len(reports) > 1))
