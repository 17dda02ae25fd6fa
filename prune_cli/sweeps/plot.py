"""The picture of a sweep: one Vega-Lite specification, drawn as SVG and PNG."""

from __future__ import annotations

import json
from typing import Any

from prune_cli.report.drawing import vl_convert
from prune_cli.sweeps.report import SweepReport

SWEEP_SVG, SWEEP_PNG = "sweep.svg", "sweep.png"
_VEGA_LITE = "5.20"
_PIXELS_PER_POINT = 2.0
_WIDTH, _HEIGHT, _HEIGHT_OF_SIZES, _HEIGHT_OF_BLOCKS = 560, 340, 160, 120
_ROW = 14  # pixels between the intervals of two knees
# Told apart also by the colour-blind (Okabe and Ito).
_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933"]
# Even near the dense model, where small differences count, and as a logarithm above.
_SCALE = {"type": "symlog", "constant": 0.05, "nice": False}
_SIZE = "weights as a sparse file, of the dense ones"
_SPARSITY, _INCREASE = "asked sparsity", "loss increase (nats per token)"


def chart(report: SweepReport) -> dict[str, Any]:
    """The curves with the dense line, patterns and knees; below them loss over size, and blocks alone, if measured."""
    panels = [_curves(report), _sizes(report)]
    if report.sensitivity is not None:
        panels.append(_blocks(report))
    dense, told = report.dense, any(each.knee.sparsity is not None for each in report.knees)
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "description": f"Loss increase over sparsity of {report.request['model']}, by method",
        "title": {
            "text": f"{report.request['model'].rstrip('/').rpartition('/')[2]}: loss over sparsity",
            "subtitle": [
                f"{report.text.source}, {dense.windows} windows of {report.text.seq_len} tokens; "
                f"dense loss {dense.loss:.3f}, perplexity {dense.perplexity:.2f}",
                *(["knee: the sparsity from which the loss climbs fast, with its 95 % interval"] if told else []),
            ],
            "anchor": "start",
        },
        "background": "white",
        "vconcat": panels,
        "resolve": {"scale": {"color": "shared"}},
        "config": {"view": {"stroke": None}},
    }


def _curves(report: SweepReport) -> dict[str, Any]:
    methods = list(dict.fromkeys(point.method for point in report.points))
    colour = {
        "field": "method",
        "type": "nominal",
        "sort": methods,
        "legend": {"symbolOpacity": 1},
        "scale": {"domain": methods, "range": [_COLOURS[at % len(_COLOURS)] for at in range(len(methods))]},
    }
    x = {"field": "sparsity", "type": "quantitative", "title": _SPARSITY, "scale": {"domain": [0, 1]}}
    rows = [
        {
            "method": point.method,
            "pattern": point.pattern,
            "sparsity": point.asked_sparsity,
            "increase": point.loss_increase,
            "low": point.loss_increase - point.loss_increase_standard_error,
            "high": point.loss_increase + point.loss_increase_standard_error,
        }
        for point in report.points
    ]
    bounds = {"domainMin": min(row["low"] for row in rows), "domainMax": 1.03 * max(row["high"] for row in rows)}
    y = {"field": "increase", "type": "quantitative", "title": _INCREASE, "scale": {**bounds, **_SCALE}}
    free = {"values": [row for row in rows if row["pattern"] is None]}
    patterns = {"values": [row for row in rows if row["pattern"] is not None]}
    spread = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour}
    shape = {"field": "pattern", "type": "nominal", "scale": {"range": ["diamond", "triangle-up", "square", "cross"]}}
    layers: list[dict[str, Any]] = [
        *_knees(report, colour),
        {
            "data": {"values": [{"increase": 0.0, "model": "dense"}]},
            "mark": {"type": "rule", "color": "#555555", "strokeDash": [6, 4], "aria": True},
            "encoding": {"y": y},
        },
        {
            "data": {"values": [{"increase": 0.0, "sparsity": 1.0, "model": "dense"}]},
            "mark": {"type": "text", "align": "right", "dy": -7, "color": "#555555"},
            "encoding": {"x": x, "y": y, "text": {"field": "model"}},
        },
        {"data": free, "mark": "line", "encoding": {"x": x, "y": y, "color": colour}},
        {"data": free, "mark": {"type": "rule"}, "encoding": spread},
        {"data": free, "mark": {"type": "point", "filled": True}, "encoding": {"x": x, "y": y, "color": colour}},
    ]
    if patterns["values"]:
        mark = {"type": "point", "filled": False, "size": 110, "strokeWidth": 2}
        layers.append({"data": patterns, "mark": mark, "encoding": {"x": x, "y": y, "color": colour, "shape": shape}})
    return {"width": _WIDTH, "height": _HEIGHT, "layer": layers}


def _sizes(report: SweepReport) -> dict[str, Any]:
    """The same points over the size of a sparse file, where patterns and unstructured zeros differ."""
    rows = [
        {"method": point.method, "pattern": point.pattern, "size": point.size, "increase": point.loss_increase}
        for point in report.points
    ]
    x = {"field": "size", "type": "quantitative", "title": _SIZE, "axis": {"format": "%"}, "scale": {"zero": False}}
    y = {"field": "increase", "type": "quantitative", "title": "loss increase", "scale": _SCALE}
    colour = {"field": "method", "type": "nominal"}
    shape = {"field": "pattern", "type": "nominal"}
    line = {"mark": {"type": "line", "point": True}, "encoding": {"x": x, "y": y, "color": colour}}
    mark = {"type": "point", "filled": False, "size": 110, "strokeWidth": 2}
    points = {"mark": mark, "encoding": {"x": x, "y": y, "color": colour, "shape": shape}}
    return {
        "title": {"text": "Size against quality: lower and further left is better", "fontSize": 11},
        "width": _WIDTH,
        "height": _HEIGHT_OF_SIZES,
        "layer": [
            {"data": {"values": [row for row in rows if row["pattern"] is None]}, **line},
            {"data": {"values": [row for row in rows if row["pattern"] is not None]}, **points},
        ],
    }


def _knees(report: SweepReport, colour: dict[str, Any]) -> list[dict[str, Any]]:
    """A dotted line at each knee, and above the curves a row for its interval; none for methods without."""
    told = [each for each in report.knees if each.knee.sparsity is not None]
    rows = [
        {
            "method": each.method,
            "knee": each.knee.sparsity,
            "low": each.knee.low,
            "high": each.knee.high,
            "label": f"{each.method}: knee {each.knee.sparsity:.2f}",
        }
        for each in told
    ]
    knee = {"field": "knee", "type": "quantitative", "title": _SPARSITY}
    low = {**knee, "field": "low"}
    line = {"type": "rule", "strokeDash": [2, 3], "strokeWidth": 1.5}
    layers: list[dict[str, Any]] = []
    if rows:
        layers.append({"data": {"values": rows}, "mark": line, "encoding": {"x": knee, "color": colour}})
    for at, row in enumerate(rows):
        data, y = {"values": [row]}, {"value": 10 + _ROW * at}
        bar = {"x": low, "x2": {"field": "high"}, "y": y, "color": colour}
        text = {"x": low, "y": y, "color": colour, "text": {"field": "label"}}
        layers.append({"data": data, "mark": {"type": "rule", "strokeWidth": 5, "opacity": 0.5}, "encoding": bar})
        layers.append({"data": data, "mark": {"type": "text", "align": "right", "dx": -5}, "encoding": text})
    return layers


def _blocks(report: SweepReport) -> dict[str, Any]:
    assert report.sensitivity is not None
    rows = [
        {
            "block": block.block,
            "increase": block.loss_increase,
            "low": block.loss_increase - block.loss_increase_standard_error,
            "high": block.loss_increase + block.loss_increase_standard_error,
        }
        for block in report.sensitivity.blocks
    ]
    x = {"field": "block", "type": "ordinal", "title": "block", "axis": {"labelAngle": 0, "labelOverlap": True}}
    y = {"field": "increase", "type": "quantitative", "title": "loss increase"}
    asked = f"{report.sensitivity.asked_sparsity:g}"
    return {
        "title": {"text": f"Each block alone, {report.sensitivity.method} at {asked}", "fontSize": 11},
        "width": _WIDTH,
        "height": _HEIGHT_OF_BLOCKS,
        "data": {"values": rows},
        "layer": [
            {"mark": {"type": "bar", "color": "#7a8a99"}, "encoding": {"x": x, "y": y}},
            {"mark": "rule", "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}},
        ],
    }


def pictures(report: SweepReport) -> dict[str, str | bytes]:
    """File name -> content; none where nothing can draw them."""
    drawing = vl_convert()
    if drawing is None:
        return {}
    spec = json.loads(json.dumps(chart(report)))
    svg = drawing.vegalite_to_svg(spec, vl_version=_VEGA_LITE)
    png = drawing.vegalite_to_png(spec, vl_version=_VEGA_LITE, scale=_PIXELS_PER_POINT)
    return {SWEEP_SVG: svg, SWEEP_PNG: png}
