"""The report page: what it tells is what the report holds, and a browser shows it without asking anybody anything."""

from __future__ import annotations

import copy
import html.parser
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import prune_cli
from prune_cli.report.figures import alarm_of
from prune_cli.report.format import change_of, size
from prune_cli.report.html.charts import COLOURS
from prune_cli.report.html.choices import chart_of_sizes
from prune_cli.report.html.page import page_of
from prune_cli.report.html.summary import labels_of, remarks_on, tell
from prune_cli.report.html.tensor_table import kinds_of, means, points_of
from prune_cli.report.types import Report
from tests.browser import CHROMIUM, browser
from tests.conftest import RunCommand
from tests.test_repeat import parsed

pytestmark = pytest.mark.drawn


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, llama: Path, tokens_file: Path) -> Path:
    out = tmp_path_factory.mktemp("page") / "half"
    prune_cli.prune(llama, out, calibration=str(tokens_file), eval=str(tokens_file))
    return out


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "prune_report.json").read_text())


class Text(html.parser.HTMLParser):
    """The texts of a page's cells, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def test_every_prune_writes_the_page_that_the_command_makes(out: Path, tmp_path: Path, command: RunCommand) -> None:
    written = (out / "prune_report.html").read_bytes()
    made = command("report", out, "-o", tmp_path / "page.html")
    assert made.code == 0
    assert (tmp_path / "page.html").read_bytes() == written
    assert command("report", out / "prune_report.json", "-o", tmp_path / "page.html", "-q").stdout == ""
    assert (tmp_path / "page.html").read_bytes() == written


def test_the_page_lists_every_tensor_with_its_values(out: Path, report: dict[str, Any]) -> None:
    page = (out / "prune_report.html").read_text()
    rows = {row[0]: row for row in Text(page).rows}
    for tensor in report["tensors"]:
        row = rows[tensor["name"]]
        assert row[4] == tensor["action"]
        assert row[6] == f"{100 * tensor['sparsity']:.2f} %"
        error = tensor["output_error"]
        assert row[7] == ("–" if error is None else f"{error:.4f}")
        assert tensor["reason"] in row[8]


def test_the_story(report: dict[str, Any]) -> None:
    run = tell(Report.from_json(report), "A")
    assert "50.00 % of the weights in the 21 pruned tensors are zero" in run.lead[0]
    before, after = (report["evaluation"][when]["perplexity"] for when in ("before", "after"))
    assert f"from {before:.2f} to {after:.2f}" in run.lead[1]
    assert run.lead[2].endswith("on disk, as before.")
    figures = {figure.name: figure for figure in run.figures}
    assert figures["Weights on disk"].change == "as before"
    assert run.gain == report["gain"]
    assert parsed(run.command).method == "wanda"
    assert parsed(run.command).model == report["request"]["model"]


def test_a_run_without_evaluation_says_so(report: dict[str, Any]) -> None:
    run = tell(Report.from_json(report | {"evaluation": None}), "A")
    assert "What that costs was not measured" in run.lead[1]
    assert not any("Perplexity" in figure.name for figure in run.figures)


def test_the_story_of_a_smaller_dense_model(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    out = tmp_path / "shallow"
    texts = ("--calibration", tokens_file, "--eval", tokens_file)
    assert command("prune", llama, out, "-m", "depth", "-s", 0.34, *texts, "-q").code == 0
    report = json.loads((out / "prune_report.json").read_text())
    before, after = report["structure"]["before"], report["structure"]["after"]
    run = tell(Report.from_json(report), "A")
    assert run.lead[0].startswith("2 of 3 blocks are left; ")
    figures = {figure.name: figure for figure in run.figures}
    assert figures["Blocks"].in_a_line() == "3 → 2"
    assert figures["Parameters"].change == change_of(before["parameters"], after["parameters"])
    assert figures["Weights on disk"].change == change_of(before["bytes"], after["bytes"])
    assert "Zeros in the pruned tensors" not in figures
    page = (out / "prune_report.html").read_text()
    rows = Text(page).rows
    assert [row[2] for row in rows if len(row) > 2 and row[1] == "gone"] == ["the whole block"]
    assert '<option value="removed">' in page
    assert "Output error" not in page.split("<h2")[2]
    # The chart of the choice, as a table.
    for block in report["structure"]["blocks"]:
        scores, went = block["scores"], block["new_block"] is None
        refitted = scores.get("loss_without_it_refitted")
        fitted = "–" if refitted is None else f"{refitted - scores['loss_before']:.4f}"
        grown = f"{scores['loss_without_it'] - scores['loss_before']:.4f}"
        assert [str(block["block"]), grown, fitted, "removed" if went else "stays"] in rows
    tags = ModelCard.load(out / "README.md").data.get("tags")
    assert tags == ["pruned", "structured", "depth", "prune-cli"]


@pytest.mark.parametrize(
    ("before", "after", "says"), [(10, 11, "+10.0 %"), (10, 10.001, "as before"), (4, 3, "-25.0 %")]
)
def test_changes(before: float, after: float, says: str) -> None:
    assert change_of(before, after) == says


def test_kinds_are_what_maps_are_called_in_every_block() -> None:
    llama = ["model.layers.0.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight", "lm_head.weight"]
    assert list(kinds_of(llama).values()) == ["up_proj", "up_proj", "lm_head"]
    neox = ["gpt_neox.layers.0.attention.dense.weight", "gpt_neox.layers.0.mlp.dense.weight"]
    assert list(kinds_of(neox).values()) == ["attention.dense", "mlp.dense"]
    experts = [f"model.layers.{b}.mlp.experts.{e}.w1.weight" for b in (0, 1) for e in (0, 1)]
    assert set(kinds_of(experts).values()) == {"w1"}


def test_the_charts_show_means_of_what_the_report_holds(report: dict[str, Any]) -> None:
    points = points_of([Report.from_json(report)], ["A"], "output_error")
    shown = means(points, "kind", "label")
    for kind in ("q_proj", "down_proj"):
        values = [t["output_error"] for t in report["tensors"] if f".{kind}." in t["name"]]
        assert len(values) == 3
        assert shown[kind, "A"] == pytest.approx((sum(values) / 3, min(values), max(values)))


def test_reports_side_by_side(report: dict[str, Any], out: Path, tmp_path: Path, command: RunCommand) -> None:
    other = copy.deepcopy(report)
    other["output"]["folder"] = "elsewhere/owl"
    other["evaluation"]["text"]["sha256"] = "0" * 64
    for tensor in other["tensors"]:
        if tensor["action"] == "pruned":
            tensor["sparsity"] = 0.4 + 0.1 * tensor["block"]
    (tmp_path / "owl.json").write_text(json.dumps(other))
    made = command("report", out, tmp_path / "owl.json", "-o", tmp_path / "page.html")
    assert made.code == 0, made.stderr
    text = Text((tmp_path / "page.html").read_text())
    rows = {row[0]: row for row in text.rows if row}
    assert rows["Figure"] == ["Figure", "half", "owl"]
    row = rows["model.layers.2.mlp.down_proj.weight"]
    assert (row[6], row[9]) == ("50.00 %", "60.00 %")
    assert ["2", "50.00 %", "60.00 %"] in text.rows  # the chart by block, as a table
    assert remarks_on([Report.from_json(report), Report.from_json(other)]) == [
        "Perplexity was measured on different texts: those values cannot be compared."
    ]
    assert "Size against quality" not in (tmp_path / "page.html").read_text()
    other["evaluation"]["text"]["sha256"] = report["evaluation"]["text"]["sha256"]
    other["totals"]["bytes_as_sparse"] = 123_456
    chart = chart_of_sizes([Report.from_json(report), Report.from_json(other)], ["half", "owl"])
    assert chart is not None
    evaluation, totals = report["evaluation"], report["totals"]
    told = [evaluation[when] for when in ("before", "after")]
    losses = [f"{each['loss']:.4f} ± {each['loss_standard_error']:.4f}" for each in told]
    sizes = [size(each) for each in (totals["bytes_before"], totals["bytes_as_sparse"], 123_456)]
    assert chart.rows == [("dense", sizes[0], losses[0]), ("half", sizes[1], losses[1]), ("owl", sizes[2], losses[1])]
    assert labels_of([Report.from_json(report)] * 2) == ["half (1)", "half (2)"]


def test_the_page_is_shut_in_itself_and_escapes_what_others_named(report: dict[str, Any]) -> None:
    hostile = copy.deepcopy(report)
    hostile["model"]["given"] = "<script>alert(1)</script>"
    hostile["warnings"] = ['<img src="http://example.org/x.png">']
    hostile["tensors"][0]["name"] = "<b>bold"
    page = page_of([Report.from_json(hostile)])
    tags = Text(page).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not {"img", "b", "iframe", "object"} & {tag for tag, _ in tags}
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    links = {value for _, a in tags for key, value in a.items() if key in ("src", "href", "xlink:href")}
    assert all(link is not None and link.startswith(("#", "data:,")) for link in links)
    assert not any("style" in a or any(key.startswith("on") for key in a) for _, a in tags)


def test_colours_can_be_told_from_both_backgrounds() -> None:
    style = (Path(prune_cli.__file__).parent / "report" / "html" / "page.css").read_text()
    pages = re.findall(r"--page: (#[0-9a-f]{6})", style)
    assert len(pages) == 2
    for page in pages:
        assert [c for c in COLOURS if contrast(c, page) < 3] == []
    for ink in ("ink", "soft", "accent", "warn"):
        for colour, page in zip(re.findall(rf"--{ink}: (#[0-9a-f]{{6}})", style), pages, strict=True):
            assert contrast(colour, page) >= 4.5, (ink, colour)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser(out: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        url = (out / "prune_report.html").as_uri()
        page.open(url)
        every = "[...document.querySelectorAll('#list tbody tr')]"
        rows = f"{every}.filter(row => !row.hidden).map(row => row.cells[0].textContent)"
        everything = page.evaluate(rows)
        assert len(everything) == page.evaluate("document.querySelectorAll('#list tbody tr').length") > 21

        page.evaluate("document.getElementById('words').focus()")
        page.call("Input.insertText", text="mlp.up PRUNED")
        assert page.evaluate(rows) == [f"model.layers.{block}.mlp.up_proj.weight" for block in range(3)]
        assert page.evaluate("document.getElementById('shown').textContent") == f"3 of {len(everything)} tensors"
        page.press("Tab")
        assert page.evaluate("document.activeElement.id") == "action"
        page.evaluate("document.getElementById('words').value = ''")
        page.evaluate("action.value = 'kept'; action.dispatchEvent(new Event('input', {bubbles: true}))")
        assert 0 < len(page.evaluate(rows)) == len(everything) - 21

        page.evaluate("action.value = ''; action.dispatchEvent(new Event('input', {bubbles: true}))")
        errors = f"{every}.map(row => row.cells[7].textContent)"
        head = "document.querySelectorAll('#list .sorts th')[7]"
        for way in ("ascending", "descending"):
            page.evaluate(f"{head}.querySelector('button').click()")
            assert page.evaluate(f"{head}.getAttribute('aria-sort')") == way
            values = [float(text) for text in page.evaluate(errors) if text != "–"]
            assert len(values) == 21
            assert values == sorted(values, reverse=way == "descending")
            assert page.evaluate(errors)[-1] == "–"

        ink = "getComputedStyle(document.querySelector('.chart text')).fill"
        light = page.evaluate(ink)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert page.evaluate(ink) != light
        page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("document.querySelectorAll('main, header, nav, footer, [role=search]').length") == 5
    assert page.complaints == []
    assert {request for request in page.requests if not request.startswith("data:")} == {url}


def test_without_the_package_that_draws_the_tables_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from prune_cli.report.drawing import NOT_DRAWN
    from prune_cli.report.html.charts import draw

    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert html.unescape(draw([], {})) == f"<p>{NOT_DRAWN}</p>"
    assert "pip install 'prune-cli[plots]'" in NOT_DRAWN


def test_a_loss_looks_like_one_in_words_too(report: dict[str, Any]) -> None:
    assert [alarm_of(more) for more in (-1.0, 0.0, 0.099, 0.1, 0.499, 0.5)] == [
        None,
        None,
        None,
        "a clear loss",
        "a clear loss",
        "a heavy loss",
    ]
    typed = Report.from_json(report)
    assert typed.evaluation is not None
    before = typed.evaluation.before
    worse = replace(before, loss=before.loss + 0.2, perplexity=before.perplexity * 1.2214)
    for after, marked in ((worse, 2), (before, 0)):
        shown = page_of([replace(typed, evaluation=replace(typed.evaluation, after=after))])
        assert (shown.count('class="alarm"'), shown.count("<em>a clear loss</em>")) == (marked, marked)
        error = before.perplexity * before.loss_standard_error
        assert f"{before.perplexity:.2f} ± {error:.2f}" in shown
