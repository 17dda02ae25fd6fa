"""The picture of a sweep: what is in the SVG, and that the PNG is one."""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from prune_cli.report.types import Evaluation, TextReport
from prune_cli.sweeps.knee import Knee
from prune_cli.sweeps.plot import SWEEP_PNG, SWEEP_SVG, pictures
from prune_cli.sweeps.report import BlockSensitivity, KneeReport, PointReport, Sensitivity, SweepReport

pytestmark = pytest.mark.drawn
DENSE = Evaluation(perplexity=12.2, loss=2.5, loss_standard_error=0.1, windows=8, predicted_tokens=800)
NONE = Knee(None, None, None, None, None, 0.4, "one straight line fits as well (p = 0.4)")


def a_report() -> SweepReport:
    grid = [
        (method, None, step / 10, step**2 * size)
        for method, size in (("wanda", 0.02), ("a+b<c", 0.01))
        for step in range(10)
    ]
    grid += [("wanda", "2:4", 0.5, 0.8), ("wanda", "4:8", 0.5, 0.6)]
    points = [
        PointReport(method, pattern, asked, asked, DENSE, increase, 0.05, 1.0, 1 - asked / 2)
        for method, pattern, asked, increase in grid
    ]
    return SweepReport(
        schema_version=1,
        tool={"name": "prune-cli", "version": "0"},
        created="2026-01-01T00:00:00+00:00",
        request={"model": "a-model", "out": "out"},
        environment={},
        model={"architecture": "LlamaForCausalLM"},
        protocol="",
        text=TextReport("builtin", "", 8, 100, 800, None, ""),
        calibration=None,
        dense=DENSE,
        points=points,
        knee_definition="",
        knees=[KneeReport("wanda", Knee(0.61, 0.55, 0.68, 0.1, 4.0, 0.002, None)), KneeReport("a+b<c", NONE)],
        sensitivity=Sensitivity(
            "wanda", 0.5, [BlockSensitivity(0, 0.5, 0.3, 0.01), BlockSensitivity(1, 0.5, 0.1, 0.01)]
        ),
        seconds=1.0,
        warnings=(),
    )


def texts_and_marks(svg: str) -> tuple[list[str], list[str]]:
    """The texts that are drawn, and what a screen reader is told of every mark."""
    root = ElementTree.fromstring(svg)
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    return texts, [element.get("aria-label", "") for element in root.iter()]


def test_both_pictures_hold_all_series() -> None:
    made = pictures(a_report())
    svg, png = made[SWEEP_SVG], made[SWEEP_PNG]
    assert isinstance(svg, str)
    assert isinstance(png, bytes)
    texts, marks = texts_and_marks(svg)
    assert {"wanda", "a+b<c", "2:4", "4:8", "dense", "wanda: knee 0.61"} <= set(texts)
    assert sum("knee" in text for text in texts) == 1
    assert "knee: the sparsity from which the loss climbs fast" in svg
    assert any(text.endswith("model: loss over sparsity") for text in texts)
    for at in range(10):
        for method, size in (("wanda", 0.02), ("a+b<c", 0.01)):
            point = f"asked sparsity: {at / 10:g}; loss increase (nats per token): {at**2 * size:g}; method: {method}"
            assert any(mark.startswith(point) for mark in marks), point
    assert any("loss increase: 0.3" in mark and "block: 0" in mark for mark in marks)
    assert any(mark.startswith("weights as a sparse file, of the dense ones: 75.0") for mark in marks)
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert width > 1000
    assert height > 800


@pytest.mark.parametrize("without", ["sensitivity", "patterns and knees"])
def test_what_was_not_measured_is_not_drawn(without: str) -> None:
    report = a_report()
    if without == "sensitivity":
        report = replace(report, sensitivity=None)
    else:
        points = [point for point in report.points if point.pattern is None]
        report = replace(report, points=points, knees=[KneeReport("wanda", NONE)])
    svg = pictures(report)[SWEEP_SVG]
    assert isinstance(svg, str)
    texts, _ = texts_and_marks(svg)
    assert "wanda" in texts
    assert any("Each block alone" in text for text in texts) == (without != "sensitivity")
    assert ("2:4" in texts) == (without == "sensitivity")


def test_without_the_package_that_draws_there_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert pictures(a_report()) == {}
