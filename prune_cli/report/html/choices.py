"""Charts of what was chosen and what it was worth: blocks that went by their scores, sizes against quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_cli.report.format import size
from prune_cli.report.html.charts import COLOURS, HEIGHT, LEGEND, WIDTH, Chart, colour_of, draw

if TYPE_CHECKING:
    from prune_cli.report.types import BlockChange, Report

# By the name of a score: what its chart calls it. Greedy losses are told as what they grow by.
_WITHOUT, _BEFORE, _REFITTED = "loss_without_it", "loss_before", "loss_without_it_refitted"
_GOES, _STAYS, _FITTED = "removed", "stays", "after the refit"


@dataclass(frozen=True)
class _Bar:
    block: int
    fate: str
    value: float
    refitted: float | None


def chart_of_choice(report: Report) -> Chart | None:
    """Which blocks went, each by its score; None where none went, or all were named."""
    blocks = report.structure.blocks if report.structure is not None else []
    bars = [_bar(block) for block in blocks if block.scores]
    if not bars or all(bar.fate == _STAYS for bar in bars):
        return None
    what = _what(next(block for block in blocks if block.scores))
    gone = [str(bar.block) for bar in bars if bar.fate == _GOES]
    fitted = any(bar.refitted is not None for bar in bars)
    header = ("block", what, *(("after the refit",) if fitted else ()), "")
    return Chart(
        title="Which blocks went",
        caption=f"{what[0].upper()}{what[1:]}, block by block; {', '.join(gone)} went.",
        svg=draw([vars(bar) for bar in bars], _bars(what, fitted=fitted)),
        header=header,
        rows=[
            (str(bar.block), f"{bar.value:.4f}", *((_number(bar.refitted),) if fitted else ()), bar.fate)
            for bar in bars
        ],
    )


def _bar(block: BlockChange) -> _Bar:
    scores, fate = block.scores, _GOES if block.new_block is None else _STAYS
    if _WITHOUT not in scores:
        return _Bar(block.block, fate, next(iter(scores.values())), None)
    before, fitted = scores[_BEFORE], scores.get(_REFITTED)
    return _Bar(block.block, fate, scores[_WITHOUT] - before, None if fitted is None else fitted - before)


def _what(block: BlockChange) -> str:
    if _WITHOUT in block.scores:
        return "how much the calibration loss grows without it, in nats per token"
    return next(iter(block.scores)).replace("_", " ")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _bars(what: str, *, fitted: bool) -> dict[str, Any]:
    x = {"field": "block", "type": "ordinal", "title": "decoder block", "axis": {"labelAngle": 0, "labelOverlap": True}}
    y = {"field": "value", "type": "quantitative", "title": "loss increase" if fitted else what.partition(",")[0]}
    names = (_GOES, _STAYS, *((_FITTED,) if fitted else ()))
    colours = {"domain": list(names), "range": [COLOURS[1], COLOURS[0], "currentColor"][: len(names)]}
    fate = {"field": "fate", "type": "nominal", "scale": colours, "legend": LEGEND}
    bars = {"mark": {"type": "bar", "opacity": 0.6}, "encoding": {"x": x, "y": y, "color": fate}}
    ticks = {
        "transform": [{"filter": "isValid(datum.refitted)"}],
        "mark": {"type": "tick", "thickness": 3},
        "encoding": {"x": x, "y": {**y, "field": "refitted"}, "color": {"datum": _FITTED}},
    }
    return {"width": WIDTH, "height": HEIGHT, "layer": [bars, ticks] if fitted else [bars]}


def chart_of_sizes(reports: Sequence[Report], labels: Sequence[str]) -> Chart | None:
    """Size of the weights against loss; None for fewer than two runs that were measured on one text."""
    found = [(report, label) for report, label in zip(reports, labels, strict=True) if report.evaluation is not None]
    texts = {report.evaluation.text.sha256 for report, _ in found if report.evaluation is not None}
    if len(found) < 2 or len(texts) > 1:
        return None
    dense, names = found[0][0], ["dense", *(label for _, label in found)]
    assert dense.evaluation is not None
    before = dense.evaluation.before
    rows = [_of_size("dense", dense.totals.bytes_before, before.loss, before.loss_standard_error)]
    for report, label in found:
        assert report.evaluation is not None
        after, totals = report.evaluation.after, report.totals
        takes = totals.bytes_after if totals.bytes_as_sparse is None else totals.bytes_as_sparse
        rows.append(_of_size(label, min(takes, totals.bytes_after), after.loss, after.loss_standard_error))
    return Chart(
        title="Size against quality",
        caption="Size of the weight files, zeros left out where there are any, against loss with its standard error: "
        "lower and further left is better.",
        svg=draw(rows, _scatter(names)),
        header=("", "weights", "loss, nats per token"),
        rows=[(row["name"], size(row["bytes"]), f"{row['loss']:.4f} ± {row['error']:.4f}") for row in rows],
    )


def _of_size(name: str, nbytes: int, loss: float, error: float) -> dict[str, Any]:
    return {
        "name": name,
        "bytes": nbytes,
        "megabytes": nbytes / 1e6,
        "loss": loss,
        "error": error,
        "low": loss - error,
        "high": loss + error,
    }


def _scatter(names: Sequence[str]) -> dict[str, Any]:
    loose = {"zero": False, "nice": True}
    x = {"field": "megabytes", "type": "quantitative", "title": "weights, MB", "scale": {"zero": True}}
    y = {"field": "loss", "type": "quantitative", "title": "loss, nats per token", "scale": loose}
    colour = colour_of("name", names)
    shape = {"field": "name", "type": "nominal", "scale": {"domain": list(names)}, "legend": LEGEND}
    point = {"type": "point", "filled": True, "size": 80, "opacity": 1}
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour},
            },
            {"mark": point, "encoding": {"x": x, "y": y, "color": colour, "shape": shape}},
        ],
    }
