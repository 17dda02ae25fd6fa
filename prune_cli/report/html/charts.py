"""The page's charts: Vega-Lite specs of what was measured, drawn as SVG without a browser and without the network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prune_cli.report.drawing import NOT_DRAWN, vl_convert
from prune_cli.report.format import percent
from prune_cli.report.html.tensor_table import Point, means

# Each has a contrast of at least 3 to 1 with the page's light and its dark background.
COLOURS = ("#2f7de1", "#c2680a", "#0d8f68", "#d1347f", "#8b5cf6", "#0a8ba3", "#d63a3a", "#7c7f1b", "#6b7a90")
# Below this spread a chart of sparsity would be one flat line.
FLAT = 0.005
WIDTH, HEIGHT, _ROW_HEIGHT = 420, 220, 22


@dataclass(frozen=True)
class Chart:
    """`svg` is markup of our own making; `header` and `rows` are the same values as text."""

    title: str
    caption: str
    svg: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Quantity:
    """What is drawn: its name on the axis and how its numbers are written."""

    title: str
    format: str | None
    is_share: bool

    def text(self, value: float) -> str:
        return percent(value) if self.is_share else f"{value:.4f}"


SPARSITY = Quantity("sparsity", "%", True)
OUTPUT_ERROR = Quantity("output error", None, False)
SCORE = Quantity("score", None, False)


def is_flat(points: Sequence[Point]) -> bool:
    values = [point.value for point in points]
    return max(values) - min(values) <= FLAT


def charts_of(points: Sequence[Point], quantity: Quantity, *, several: bool) -> list[Chart]:
    """By block and by kind of layer; `several` reports are told from each other by colour, else the kinds are."""
    series = "label" if several else "kind"
    charts = [_by_kind(points, quantity, several=several)]
    if any(point.block is not None for point in points):
        caption = "Mean of the pruned layers of a block." if several else "Each kind of layer, block by block."
        charts.insert(0, by_block([point for point in points if point.block is not None], quantity, series, caption))
    return charts


def by_block(points: Sequence[Point], quantity: Quantity, series: str, caption: str) -> Chart:
    """A line for each value of `series`, a field of the points, over the blocks; every point has a block."""
    values = means(points, "block", series)
    names = list(dict.fromkeys(name for _, name in values))
    blocks = sorted({block for block, _ in values})
    data = [{"block": block, "series": name, "value": mean} for (block, name), (mean, _, _) in values.items()]
    spec = {
        "width": WIDTH,
        "height": HEIGHT,
        "mark": {"type": "line", "point": {"size": 36, "filled": True}, "strokeWidth": 1.5},
        "encoding": {
            "x": {
                "field": "block",
                "type": "quantitative",
                "title": "decoder block",
                "axis": {"tickMinStep": 1, "format": "d"},
            },
            "y": _axis("y", quantity),
            "color": colour_of("series", names),
            "shape": {"field": "series", "type": "nominal", "scale": {"domain": names}, "legend": LEGEND},
        },
    }
    return Chart(
        title=f"{quantity.title[0].upper()}{quantity.title[1:]} by block",
        caption=caption,
        svg=draw(data, spec),
        header=("block", *names),
        rows=[
            (str(block), *(quantity.text(values[block, name][0]) if (block, name) in values else "–" for name in names))
            for block in blocks
        ],
    )


def _by_kind(points: Sequence[Point], quantity: Quantity, *, several: bool) -> Chart:
    values = means(points, "kind", "label")
    # Of equal ones the first comes first: the order of a set differs from process to process.
    kinds = sorted(
        dict.fromkeys(kind for kind, _ in values),
        key=lambda kind: -max(v[0] for k, v in values.items() if k[0] == kind),
    )
    labels = list(dict.fromkeys(label for _, label in values))
    data = [
        {"kind": kind, "series": label if several else kind, "value": mean, "least": least, "most": most}
        for (kind, label), (mean, least, most) in values.items()
    ]
    y = {"field": "kind", "type": "nominal", "title": None, "sort": kinds}
    x = _axis("x", quantity)
    shift = {"yOffset": {"field": "series", "type": "nominal", "sort": labels}} if several else {}
    colour = {"color": colour_of("series", labels)} if several else {"color": {"value": COLOURS[0]}}
    spec = {
        "width": WIDTH,
        "height": _ROW_HEIGHT * len(kinds) * (len(labels) if several else 1),
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.6},
                "encoding": {"y": y, "x": {**x, "field": "least"}, "x2": {"field": "most"}, **shift, **colour},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {"y": y, "x": x, **shift, **colour},
            },
        ],
    }
    return Chart(
        title=f"{quantity.title.capitalize()} by kind of layer",
        caption="Mean over the blocks; the line goes from the least to the greatest.",
        svg=draw(data, spec),
        header=("kind of layer", *(("report",) if several else ()), "mean", "least", "greatest"),
        rows=[
            (kind, *((label,) if several else ()), *map(quantity.text, values[kind, label]))
            for kind in kinds
            for label in labels
            if (kind, label) in values
        ],
    )


_WHOLE = {"tickMinStep": 1, "format": "d"}
LEGEND = {"title": None, "orient": "bottom", "columns": 4, "labelLimit": 240}


def _axis(channel: str, quantity: Quantity) -> dict[str, Any]:
    return {
        "field": "value",
        "type": "quantitative",
        "title": quantity.title,
        "axis": {"tickCount": 6, "titlePadding": 14} | ({"format": quantity.format} if quantity.format else {}),
        "scale": {"zero": not quantity.is_share},
    }


def colour_of(field: str, names: Sequence[str]) -> dict[str, Any]:
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
    return {"field": field, "type": "nominal", "scale": {"domain": names, "range": colours}, "legend": LEGEND}


def draw(data: Sequence[dict[str, Any]], spec: dict[str, Any]) -> str:
    """The SVG of a Vega-Lite spec; its text has the colour of the text around it, so that it fits a dark page too.

    A sentence where nothing can draw it.
    """
    drawing = vl_convert()
    if drawing is None:
        return f"<p>{html.escape(NOT_DRAWN)}</p>"
    ink = "currentColor"
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": None,
        "data": {"values": list(data)},
        **spec,
        "config": {
            "aria": False,
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "axis": {
                "labelColor": ink,
                "titleColor": ink,
                "domainColor": ink,
                "tickColor": ink,
                "gridColor": ink,
                "gridOpacity": 0.15,
                "domainOpacity": 0.5,
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
            },
            "legend": {"labelColor": ink, "labelFontSize": 12, "symbolStrokeWidth": 1.5},
        },
    }
    return drawing.vegalite_to_svg(whole)
