"""A chart takes longer to draw than a tiny run: where no test looks at it, an empty picture stands for it."""

from __future__ import annotations

from prune_cli.report.drawing import vl_convert
from prune_cli.report.html import charts
from prune_cli.sweeps import plot


class _NoDrawing:
    """In place of vl_convert."""

    @staticmethod
    def vegalite_to_svg(*_: object, **__: object) -> str:
        return "<svg></svg>"

    @staticmethod
    def vegalite_to_png(*_: object, **__: object) -> bytes:
        return b""


def draw_charts(*, really: bool) -> None:
    """In this process, from now on."""
    charts.vl_convert = plot.vl_convert = vl_convert if really else lambda: _NoDrawing
