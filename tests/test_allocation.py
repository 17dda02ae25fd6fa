"""--allocate: budgets, the papers' formulas against naive ones, files, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from methods._allocation import (
    ScoreHistogram,
    arithmetic,
    erk,
    mean_sparsity,
    outlier_share,
    owl,
    steepest_slope,
    to_budget,
)
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.tiny import load_plain

ASKED = st.floats(0.05, 0.95)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**6)), min_size=1, max_size=12), ASKED)
def test_the_weighted_mean_is_what_was_asked(wishes: list[tuple[float, int]], asked: float) -> None:
    counts = {str(at): count for at, (_, count) in enumerate(wishes)}
    table = to_budget({str(at): wish for at, (wish, _) in enumerate(wishes)}, counts, asked)
    assert mean_sparsity(table, counts) == pytest.approx(asked, abs=1e-12)
    assert all(0 <= value < 1 for value in table.values())


def test_a_steep_wish_still_keeps_the_budget() -> None:
    """Forty blocks at slope 1: nearly all of them at a bound."""
    counts = {str(block): 100 + block for block in range(40)}
    assert mean_sparsity(arithmetic(counts, 0.8, 1.0), counts) == pytest.approx(0.8)


def test_a_wish_stays_within_the_spread() -> None:
    table = to_budget({"a": 0.0, "b": 0.5, "c": 0.99}, {"a": 40, "b": 40, "c": 20}, 0.6, 0.2)
    assert (table["a"], table["c"]) == (pytest.approx(0.4), pytest.approx(0.8))
    assert mean_sparsity(table, {"a": 40, "b": 40, "c": 20}) == pytest.approx(0.6)


def test_a_wish_within_bounds_keeps_its_differences() -> None:
    table = to_budget({"a": 0.4, "b": 0.5, "c": 0.7}, {"a": 10, "b": 30, "c": 60}, 0.6)
    assert table["b"] - table["a"] == pytest.approx(0.1)
    assert table["c"] - table["b"] == pytest.approx(0.2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=9), ASKED)
def test_erk_spends_the_budget(shapes: list[tuple[int, int]], asked: float) -> None:
    named = {str(at): shape for at, shape in enumerate(shapes)}
    counts = {name: rows * inputs for name, (rows, inputs) in named.items()}
    table = erk(named, asked)
    assert mean_sparsity(table, counts) == pytest.approx(asked, abs=1e-9)


def test_erk_densities_are_in_proportion() -> None:
    shapes = {"square": (512, 512), "wide": (512, 2048), "large": (2048, 2048)}
    density = {name: 1 - value for name, value in erk(shapes, 0.8).items()}
    for name, (rows, inputs) in shapes.items():
        share = density[name] / density["large"]
        assert share == pytest.approx((rows + inputs) / (rows * inputs) / (4096 / 2048**2))


def test_owl_equals_the_formula() -> None:
    scores = [torch.tensor([[1.0, 1, 1, 9]]), torch.tensor([[1.0, 1], [1, 1]])]
    assert outlier_share(scores, 4.0) == 1 / 8
    table = owl({"0": 0.02, "1": 0.05, "2": 0.03}, {"0": 10, "1": 20, "2": 10}, 0.7, 0.08)
    keep = {"0": 0.0, "1": 2 * 0.08, "2": 2 * 0.08 / 3}
    mean = (10 * keep["0"] + 20 * keep["1"] + 10 * keep["2"]) / 40
    for name, value in table.items():
        assert value == pytest.approx(1 - (keep[name] - mean + 0.3))


def test_arithmetic_progression_over_depth() -> None:
    counts = {str(block): 100 for block in range(5)}
    values = list(arithmetic(counts, 0.6, 0.05).values())
    assert values == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])
    steepest = list(arithmetic(counts, 0.4, steepest_slope(5, 0.4)).values())
    assert steepest[0] == pytest.approx(0, abs=1e-9)


def test_the_global_threshold_is_that_of_all_scores_sorted() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {f"t{at}": torch.rand(40, 50, generator=generator) * (1 + at / 4) for at in range(4)}
    histogram = ScoreHistogram()
    for name, score in scores.items():
        histogram.add(name, score)
    table = histogram.sparsities(0.6)
    everything = torch.cat([score.reshape(-1) for score in scores.values()])
    threshold = everything.sort().values[int(0.6 * len(everything))]
    for name, score in scores.items():
        assert table[name] == pytest.approx(float((score < threshold).float().mean()), abs=0.005)
    assert mean_sparsity(table, {name: score.numel() for name, score in scores.items()}) == pytest.approx(0.6)


def _zeros_short_of_the_budget(report: Any, asked: float) -> tuple[float, int]:
    pruned = [t for t in report["tensors"] if t["action"] == "pruned"]
    weights = sum(t["shape"][0] * t["shape"][1] for t in pruned)
    return asked * weights - report["totals"]["zeros_in_pruned"], sum(t["shape"][0] for t in pruned)


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("erk", "wanda"),
        ("owl", "magnitude"),
        ("atp", "wanda"),
        ("sensitivity", "magnitude"),
        ("global", "wanda"),
        ("global", "magnitude"),
    ],
)
def test_every_allocation_keeps_the_budget_and_can_be_given_back(
    strategy: str, method: str, llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    common = ["--method", method, "--calibration", tokens_file, "-q"]
    first = command("prune", llama, tmp_path / "a", "-s", 0.6, "--allocate", strategy, *common)
    assert first.code == 0, first.stderr
    report = json.loads((tmp_path / "a" / "prune_report.json").read_text())
    short, rows = _zeros_short_of_the_budget(report, 0.6)
    assert -1e-6 <= short <= rows
    table = report["allocation"]["sparsity"]
    assert len(set(table.values())) > 1 or report["allocation"]["facts"].get("slope") == 0
    for tensor in report["tensors"]:
        if tensor["action"] == "pruned":
            assert tensor["asked_sparsity"] == table[tensor["name"]]

    again = f"file:{tmp_path / 'a' / 'prune_report.json'}"
    assert command("prune", llama, tmp_path / "b", "--allocate", again, *common).code == 0
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_owl_measures_the_dense_model(llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    arguments = ["--allocate", "owl", "-o", "owl.outlier=3", "--calibration", tokens_file, "-q"]
    assert command("prune", llama, tmp_path / "out", *arguments).code == 0
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert report["allocation"]["options"] == {"outlier": 3.0, "spread": 0.08}
    model = load_plain(llama)
    scores: dict[str, torch.Tensor] = {}

    def observe(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        norm = inputs[0].reshape(-1, inputs[0].shape[-1]).norm(dim=0)
        scores[name] = module.get_parameter("weight").abs() * norm

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(partial(observe, name))
    with torch.no_grad():
        model(token_ids())
    for block, share in report["allocation"]["facts"]["outlier_shares"].items():
        own = torch.cat([value.reshape(-1) for name, value in scores.items() if f".layers.{block}." in name])
        assert share == pytest.approx(float((own > 3 * own.mean()).float().mean()), abs=2 / own.numel())


def test_atp_takes_the_slope_with_the_lowest_loss(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    arguments = ["--allocate", "atp", "-o", "atp.candidates=3", "--calibration", tokens_file, "-q"]
    assert command("prune", llama, tmp_path / "out", *arguments).code == 0
    facts = json.loads((tmp_path / "out" / "prune_report.json").read_text())["allocation"]["facts"]
    assert [round(tried["slope"], 6) for tried in facts["tried"]] == [0, round(0.5 / 3, 6), round(1 / 3, 6)]
    best = min(facts["tried"], key=lambda tried: tried["calibration_loss"])
    assert facts["slope"] == best["slope"]
    # Its loss is that of the model that plain Wanda with this slope writes, on the same text.
    fixed = ["--allocate", "atp", "-o", f"atp.slope={facts['tried'][1]['slope']}", "--calibration", tokens_file, "-q"]
    assert command("prune", llama, tmp_path / "fixed", *fixed).code == 0
    measured = command("eval", tmp_path / "fixed", "--data", tokens_file, "--json", "-q").json["evaluation"]["loss"]
    assert facts["tried"][1]["calibration_loss"] == pytest.approx(measured, abs=1e-5)


def test_a_file_edited_by_hand_is_followed(llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    assert command("prune", llama, tmp_path / "a", "--calibration", tokens_file, "-q").code == 0
    table = json.loads((tmp_path / "a" / "prune_report.json").read_text())["allocation"]["sparsity"]
    name = "model.layers.1.mlp.down_proj.weight"
    table[name] = 0.25
    (tmp_path / "mine.json").write_text(json.dumps({"sparsity": table}))
    given = ["--allocate", f"file:{tmp_path / 'mine.json'}", "--calibration", tokens_file, "-q"]
    assert command("prune", llama, tmp_path / "b", *given).code == 0
    weights = {k: v for file in (tmp_path / "b").glob("*.safetensors") for k, v in load_file(file).items()}
    assert float((weights[name] == 0).float().mean()) == 0.25
    other = "model.layers.0.mlp.down_proj.weight"
    assert float((weights[other] == 0).float().mean()) == 0.5


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no table"),
        ('{"sparsity": {"x": 0.5}}', "names x, which this run does not prune (1 too many"),
        ('{"schema_version": 9, "sparsity": {}}', "has schema_version 9"),
        ('{"sparsity": {}}', "says nothing of model.layers.0."),
    ],
)
def test_files_that_do_not_fit_are_refused(
    document: str, says: str, llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    (tmp_path / "table.json").write_text(document)
    arguments = ["--allocate", f"file:{tmp_path / 'table.json'}", "--calibration", tokens_file]
    outcome = command("prune", llama, tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert says in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--allocate", "best"], "--allocate is 'best': choose one of uniform, erk"),
        (["--allocate", "owl", "--pattern", "2:4"], "does not go with --pattern 2:4"),
        (["--allocate", "file:x", "-s", "0.5"], "exclude each other"),
        (["--allocate", "file:nowhere.json"], "cannot be read"),
        (["--allocate", "owl", "-o", "owl.beta=1"], "The allocation owl has no option 'beta'"),
        (["--allocate", "erk", "-o", "owl.spread=1"], "names the step 'owl'"),
        (["--allocate", "owl", "-o", "owl.spread=nan"], "must be at least 0 and at most 1"),
        (["--allocate", "atp", "-o", "atp.candidates=0"], "must be at least 1"),
        (["--allocate", "atp", "-o", "atp.slope=7"], "must be at least -1 and at most 1"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    arguments: list[str], says: str, llama: Path, tmp_path: Path, command: RunCommand
) -> None:
    outcome = command("prune", llama, tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert says in outcome.stderr.replace("\n", " ")


def test_a_resumed_run_keeps_the_table(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_cli.unstructured import run as run_module

    arguments = ["--allocate", "owl", "--calibration", tokens_file, "-q"]
    assert command("prune", llama, tmp_path / "expected", *arguments).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prune_block", _interrupt)
        assert command("prune", llama, tmp_path / "out", *arguments).code == 130
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "allocate", _interrupt)
        assert command("prune", llama, tmp_path / "out", *arguments, "--resume").code == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
