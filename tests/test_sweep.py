"""`prune-cli sweep`: its points against `prune` and `eval`, its files against each other, resuming, and refusals."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from prune_cli.checkpoint.file_names import partial_folder
from prune_cli.engine import activation_offload as parking
from prune_cli.engine import memory_limit
from prune_cli.errors import PruneError, RequestError
from prune_cli.sweeps import workers
from prune_cli.sweeps.grid import parse_method, parse_sparsities
from prune_cli.sweeps.journal import POINTS
from prune_cli.sweeps.report import sweep_schema
from tests.conftest import RunCommand
from tests.tiny import save_tiny

METHODS = "wanda,magnitude,best,wanda+swaps"
GRID = ("-m", METHODS, "-s", "0:0.5:0.5", "--pattern", "2:4")


@pytest.fixture
def texts(tokens_file: Path) -> tuple[Any, ...]:
    return ("--data", tokens_file, "--calibration", tokens_file, "--batch-size", 4, "-q")


def read(out: Path) -> Any:
    report = json.loads((out / "sweep.json").read_text())
    jsonschema.validate(report, sweep_schema())
    return report


def test_points_equal_prune_and_eval(llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand) -> None:
    done = command("sweep", llama, tmp_path / "sweep", *GRID, *texts, "--sensitivity", 0)
    assert done.code == 0, done.stderr
    report = read(tmp_path / "sweep")
    said = {"wanda": ["-m", "wanda"], "magnitude": ["-m", "magnitude"], "best": ["--preset", "best"]}
    said["wanda+swaps"] = ["-m", "wanda", "--refine", "swaps"]
    assert len(report["points"]) == 4 * 3
    # Each method at one of the two, and each of the two with and without a step after the method.
    tried = {("wanda", None), ("magnitude", "2:4"), ("best", "2:4"), ("wanda+swaps", None)}
    for point in report["points"]:
        assert point["loss_increase"] == pytest.approx(
            point["evaluation"]["loss"] - report["dense"]["loss"], rel=1e-9, abs=1e-12
        )
        if point["asked_sparsity"] == 0:
            assert point["evaluation"] == report["dense"]
        if point["asked_sparsity"] == 0 or (point["method"], point["pattern"]) not in tried:
            continue
        out = tmp_path / f"{point['method']}-{point['pattern'] or point['asked_sparsity']}"
        how = ["--pattern", point["pattern"]] if point["pattern"] else ["-s", point["asked_sparsity"]]
        pruned = command("prune", llama, out, *said[point["method"]], *how, "--eval", *texts[1:])
        assert pruned.code == 0, pruned.stderr
        expected = json.loads((out / "prune_report.json").read_text())
        assert point["evaluation"] == expected["evaluation"]["after"], point
        assert report["dense"] == expected["evaluation"]["before"]
        assert point["sparsity"] == expected["totals"]["sparsity_of_pruned"]


@pytest.mark.parametrize("method", ["wanda", "best"])
def test_a_block_alone_equals_prune_with_include(
    method: str, llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand
) -> None:
    done = command("sweep", llama, tmp_path / "sweep", "-m", method, "-s", 0.5, "--sensitivity", 0.6, *texts)
    assert done.code == 0, done.stderr
    report = read(tmp_path / "sweep")
    table = report["sensitivity"]
    assert (table["method"], table["asked_sparsity"]) == (method, 0.6)
    assert [block["block"] for block in table["blocks"]] == [0, 1, 2]
    said = ["--preset", method] if method == "best" else ["-m", method]
    alone = ["--include", "*.layers.1.*_proj.weight", "-s", 0.6, "--eval", *texts[1:]]
    assert command("prune", llama, tmp_path / "one", *said, *alone).code == 0
    expected = json.loads((tmp_path / "one" / "prune_report.json").read_text())
    increase = expected["evaluation"]["after"]["loss"] - expected["evaluation"]["before"]["loss"]
    assert table["blocks"][1]["loss_increase"] == pytest.approx(increase, rel=1e-9, abs=1e-12)
    assert table["blocks"][1]["sparsity"] == expected["totals"]["sparsity_of_pruned"]


@pytest.mark.drawn
def test_files_agree_and_side_by_side_changes_nothing(
    llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ("-m", "wanda,wanda+swaps", *GRID[2:], *texts)
    assert command("sweep", llama, tmp_path / "a", *grid).code == 0
    monkeypatch.setattr(workers, "_MOST_CONCURRENT", 1)
    assert command("sweep", llama, tmp_path / "b", *grid, "--device", "cpu,cpu").code == 0
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    for one, other in zip(a["points"], b["points"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert a["sensitivity"] == b["sensitivity"]
    assert a["knees"] == b["knees"]
    with (tmp_path / "a" / "sweep.csv").open() as file:
        dense, *lines = csv.DictReader(file)
    assert float(dense["loss"]) == a["dense"]["loss"]
    for line, point in zip(lines, a["points"], strict=True):
        flat = {**point, **point["evaluation"]}
        for key, value in line.items():
            assert (value == (flat[key] or "")) if key in ("method", "pattern") else float(value) == flat[key]
    with (tmp_path / "a" / "blocks.csv").open() as file:
        blocks = list(csv.DictReader(file))
    assert [float(block["loss_increase"]) for block in blocks] == [
        block["loss_increase"] for block in a["sensitivity"]["blocks"]
    ]
    assert not list(tmp_path.glob("*.partial"))
    assert "wanda+swaps" in (tmp_path / "a" / "sweep.svg").read_text()
    assert (tmp_path / "a" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def _stop_after(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    original = workers.measure_concurrently
    count = iter(range(groups))

    def measure(*arguments: Any) -> Any:
        if next(count, None) is None:
            raise PruneError("the plug was pulled")
        return original(*arguments)

    monkeypatch.setattr(workers, "measure_concurrently", measure)


def test_a_killed_sweep_continues_to_the_same_results(
    llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("-m", "wanda,best", "-s", 0.5, "--sensitivity", 0, *texts)
    assert command("sweep", llama, tmp_path / "expected", *arguments).code == 0
    out = tmp_path / "out"
    monkeypatch.setattr(workers, "_MOST_CONCURRENT", 1)
    with monkeypatch.context() as patch:
        _stop_after(patch, 1)
        stopped = command("sweep", llama, out, *arguments)
    assert stopped.code == 1
    assert "the plug was pulled" in stopped.stderr
    assert not out.exists()
    journal = partial_folder(out) / POINTS
    assert journal.read_text().count('"losses"') == 1
    journal.write_text(journal.read_text() + '{"point": {"cut sh')
    assert "--resume" in command("sweep", llama, out, *arguments).stderr
    with monkeypatch.context() as patch:
        _stop_after(patch, 1)
        assert command("sweep", llama, out, *arguments, "--resume").code == 0
    expected, found = read(tmp_path / "expected"), read(out)
    for one, other in zip(expected["points"], found["points"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    refused = command("sweep", llama, out, *arguments, "--resume", "--seed", 3)
    assert refused.code == 2
    assert "seed differ" in refused.stderr
    assert not partial_folder(out).exists()


def test_states_that_wait_in_files_change_nothing(
    llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("-m", "wanda,best", "-s", 0.5, "--sensitivity", 0, *texts)
    assert command("sweep", llama, tmp_path / "memory", *arguments).code == 0
    in_files = []
    original = parking._in_a_file
    monkeypatch.setattr(memory_limit._Limits, "hold", lambda _, estimate, budget: budget.states == 0)
    monkeypatch.setattr(parking, "_in_a_file", lambda *given: in_files.append(given[0].shape) or original(*given))
    assert command("sweep", llama, tmp_path / "files", *arguments).code == 0
    memory, files = read(tmp_path / "memory"), read(tmp_path / "files")
    assert [point["evaluation"] for point in memory["points"]] == [point["evaluation"] for point in files["points"]]
    hidden = json.loads((llama / "config.json").read_text())["hidden_size"]
    assert in_files.count((2, 24, hidden)) >= 2 * 2 * 2, "evaluation and calibration, two points, two blocks"


def test_points_are_added_to_a_sweep_that_is_done(
    llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert command("sweep", llama, out, "-s", "0.3,0.6", "--sensitivity", 0, *texts).code == 0
    before = read(out)
    assert command("sweep", llama, out, "-s", "0.3,0.6", *texts).code == 2
    _stop_after(monkeypatch, 1)
    added = command("sweep", llama, out, "-m", "wanda,ria", "-s", "0.3,0.6", "--sensitivity", 0, *texts, "--resume")
    assert added.code == 0, added.stderr
    after = read(out)
    assert after["points"][:2] == before["points"]
    assert [point["method"] for point in after["points"]] == ["wanda", "wanda", "ria", "ria"]


def test_a_knee_is_marked_where_the_loss_begins_to_grow(
    llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand
) -> None:
    done = command("sweep", llama, tmp_path / "out", "-m", "random", "--json", "--sensitivity", 0, *texts)
    assert done.code == 0, done.stderr
    (told,) = done.json["knees"]
    knee = told["knee"]
    assert told["method"] == "random"
    assert (knee["sparsity"] is None) == (knee["reason"] is not None)
    assert "two segments" in done.json["knee_definition"]


def test_dense_targets_stay_by_sublayer_and_it_is_said(
    llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand
) -> None:
    arguments = ("-m", "wanda,best", "-s", 0.5, "--sensitivity", 0, *texts)
    assert command("sweep", llama, tmp_path / "block", *arguments, "--calibrate-by", "block").code == 0
    assert command("sweep", llama, tmp_path / "sublayer", *arguments).code == 0
    block, sublayer = read(tmp_path / "block"), read(tmp_path / "sublayer")
    assert block["points"][1]["evaluation"] == sublayer["points"][1]["evaluation"]
    assert block["points"][0]["evaluation"] != sublayer["points"][0]["evaluation"]
    assert "best: dense targets" in block["warnings"][0]
    assert sublayer["warnings"] == []


def test_a_dry_run_tells_the_work_and_does_none(
    llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand
) -> None:
    plan = command("sweep", llama, tmp_path / "out", *GRID, *texts, "--dry-run", "--json").json
    assert plan["points"] == dict.fromkeys(METHODS.split(","), 2)
    assert plan["blocks_alone"] == 3
    assert plan["passes"] == 1 + math.ceil(9 / plan["side_by_side"]) + math.ceil(2 / plan["side_by_side"])
    assert not list(tmp_path.iterdir())
    shown = command("sweep", llama, tmp_path / "out", *GRID, *texts[:-1], "--dry-run")
    assert "points side by side" in shown.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:0.9:0.1", tuple(step / 10 for step in range(10))),
        ("0.5", (0.5,)),
        ("0.6,0.1:0.3:0.1,0.2", (0.1, 0.2, 0.3, 0.6)),
        ("0.5:0.75:0.1", (0.5, 0.6, 0.7)),
    ],
)
def test_grids_hold_exactly_what_was_typed(text: str, expected: tuple[float, ...]) -> None:
    assert parse_sparsities(text) == expected


def test_methods_with_steps() -> None:
    best = {"method": "admm", "target": "dense", "self_calibration": "auto", "allocate": "auto"}
    assert parse_method("best") == best
    assert parse_method("wanda+swaps+reconstruct+dense") == {
        "method": "wanda", "refine": "swaps", "reconstruct": True, "target": "dense",
    }  # fmt: skip
    with pytest.raises(RequestError, match="two steps of a kind"):
        parse_method("wanda+swaps+dsnot")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-s", "0:1:0.1"], "below 1"),
        (["-s", "0.9:0:0.1"], "no range"),
        (["-s", "a"], "FROM:TO:STEP"),
        (["-s", "0:0.9:nan"], "FROM:TO:STEP"),
        (["-s", "0:0.9:1e-9"], "no range"),
        (["-m", "wonda"], "no method or preset"),
        (["-m", "wanda,"], "commas between"),
        (["-m", "wanda+dense"], "looks at scores alone"),
        (["-m", "sparsegpt+swaps"], "--refine swaps"),
        (["-o", "sparsegpt.damping=1"], "no entry of --method"),
        (["-o", "nothing=1"], "no option"),
        (["--pattern", "4:2"], "N:M"),
        (["--pattern", "3:7"], "no multiple of 7"),
        (["--sensitivity", 1], "--sensitivity"),
        (["--windows", 0], "--eval-windows"),
        (["--device", "cpu,tpu"], "--device"),
        (["-m", "magnitude", "--include", "lm_head.weight"], "outside the blocks"),
    ],
)
def test_refusals_come_before_any_work(
    arguments: list[Any], why: str, llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand
) -> None:
    refused = command("sweep", llama, tmp_path / "out", *arguments, *texts)
    assert refused.code == 2
    assert why in refused.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_sweep_is_not_replaced(
    llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    partial_folder(tmp_path / "pruning").mkdir()
    (partial_folder(tmp_path / "pruning") / "model.safetensors").write_text("weights")
    for out in ("mine", "pruning"):
        refused = command("sweep", llama, tmp_path / out, *texts, "--overwrite")
        assert refused.code == 2
        assert "is no sweep" in refused.stderr


def test_experts_are_pruned_as_prune_does(
    tmp_path: Path, tokens_file: Path, texts: tuple[Any, ...], command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", "mixtral")
    done = command("sweep", model, tmp_path / "sweep", "-m", "wanda,best", "-s", 0.5, *texts, "--sensitivity", 0)
    assert done.code == 0, done.stderr
    for point in read(tmp_path / "sweep")["points"]:
        said = ["--preset", "best"] if point["method"] == "best" else ["-m", point["method"]]
        out = tmp_path / point["method"]
        assert command("prune", model, out, *said, "-s", 0.5, "--eval", *texts[1:]).code == 0
        expected = json.loads((out / "prune_report.json").read_text())
        assert point["evaluation"] == expected["evaluation"]["after"], point
        assert point["sparsity"] == expected["totals"]["sparsity_of_pruned"]
