"""Which blocks `--method depth` removes: scores equal to naive ones, saved statistics, and what a dry run tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from methods.structured.depth import block_count, closest_run, lowest_influence
from tests import reference_depth
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.tiny import load_plain, save_tiny

KINDS = ("llama-tied", "mpt", "gemma3_text")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of five blocks; those of MPT return tuples."""
    root = tmp_path_factory.mktemp("models")
    counts: dict[str, Any] = {kind: {"n_layers" if kind == "mpt" else "num_hidden_layers": 5} for kind in KINDS}
    return {kind: save_tiny(root / kind, kind, shards=False, **counts[kind]) for kind in KINDS}


def _run(command: RunCommand, model: Path, out: Path, *options: object) -> Any:
    outcome = command("prune", model, out, "-m", "depth", "-q", *options)
    assert outcome.code == 0, outcome.stderr
    return json.loads((out / "prune_report.json").read_text())["structure"]


def _removed(structure: Any) -> list[int]:
    return [block["block"] for block in structure["blocks"] if block["new_block"] is None]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_removes_what_a_naive_search_removes(
    kind: str, models: dict[str, Path], tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    options = ("-o", "remove=2", "-o", "windows=4", "-o", "refit=none", "--calibration", tokens_file)
    structure = _run(command, models[kind], tmp_path / "out", *options, "--batch-size", 3)
    order, losses = reference_depth.greedy(load_plain(models[kind]), token_ids()[:4], 2)
    assert _removed(structure) == sorted(order)
    for block, loss in zip(order, losses, strict=True):
        assert structure["blocks"][block]["scores"]["loss_without_it"] == pytest.approx(loss, abs=1e-5)


def test_greedy_looks_at_the_three_cheapest_after_a_refit(
    models: dict[str, Path], tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    options = ("--calibration", tokens_file, "--eval", tokens_file)
    structure = _run(command, models["llama-tied"], tmp_path / "out", "-o", "remove=1", *options)
    scores = {block["block"]: block["scores"] for block in structure["blocks"]}
    cheapest = sorted(scores, key=lambda block: scores[block]["loss_without_it"])[:3]
    refitted = {b: s["loss_without_it_refitted"] for b, s in scores.items() if "loss_without_it_refitted" in s}
    assert sorted(refitted) == sorted(cheapest)
    assert _removed(structure) == [min(refitted, key=lambda block: refitted[block])]
    for block, loss in refitted.items():
        _run(command, models["llama-tied"], tmp_path / str(block), "-o", f"which={block}", *options)
        report = json.loads((tmp_path / str(block) / "prune_report.json").read_text())
        assert report["evaluation"]["after"]["loss"] == pytest.approx(loss, abs=1e-5)


def test_greedy_in_several_passes_finds_the_same(
    models: dict[str, Path],
    tmp_path: Path,
    tokens_file: Path,
    command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("-o", "remove=2", "-o", "refit=none", "--calibration", tokens_file)
    at_once = _run(command, models["llama-tied"], tmp_path / "once", *options)
    monkeypatch.setattr("prune_cli.structured.depth.greedy.Removals._concurrent", lambda _: 2)
    assert _run(command, models["llama-tied"], tmp_path / "out", *options)["blocks"] == at_once["blocks"]


@pytest.mark.parametrize("kind", KINDS)
def test_states_give_the_papers_scores(
    kind: str, models: dict[str, Path], tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    saved = tmp_path / "states.safetensors"
    options = ("-o", "remove=2", "--calibration", tokens_file, "--batch-size", 4)
    by_influence = _run(
        command, models[kind], tmp_path / "a", *options, "-o", "score=influence", "--save-statistics", saved
    )
    by_angle = _run(command, models[kind], tmp_path / "b", *options, "-o", "score=angular", "--statistics", saved)
    plain = load_plain(models[kind])
    expected = reference_depth.influence(plain, token_ids())
    found = [block["scores"]["influence"] for block in by_influence["blocks"]]
    assert found == pytest.approx(expected, abs=1e-6)
    assert _removed(by_influence) == sorted(sorted(range(5), key=lambda block: expected[block])[:2])
    distances = reference_depth.angular(plain, token_ids(), 2)
    found = [block["scores"]["angular_distance_of_the_run_from_here"] for block in by_angle["blocks"][:4]]
    assert found == pytest.approx(distances, abs=1e-6)
    first = min(range(4), key=lambda block: distances[block])
    assert _removed(by_angle) == [first, first + 1]


def test_the_maths_breaks_ties_by_the_earlier_block() -> None:
    assert lowest_influence(torch.tensor([0.5, 0.1, 0.1, 0.1]), 2) == [1, 2]
    assert closest_run(torch.full((5, 5), 0.25), 2) == [0, 1]
    assert [block_count(share, 24) for share in (0.01, 0.125, 0.25, 0.98)] == [1, 3, 6, 23]


@pytest.mark.parametrize("score", ["greedy", "influence"])
def test_saved_statistics_serve_other_sparsities(
    score: str,
    models: dict[str, Path],
    tmp_path: Path,
    tokens_file: Path,
    command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, saved = models["llama-tied"], tmp_path / "saved.safetensors"
    options = ("-o", f"score={score}", "--calibration", tokens_file)
    _run(command, model, tmp_path / "expected-1", *options, "-o", "remove=1")
    _run(command, model, tmp_path / "expected-2", *options, "-o", "remove=2", "--save-statistics", saved)
    monkeypatch.setattr("prune_cli.structured.depth.choose.Removals.losses", None)
    monkeypatch.setattr("prune_cli.structured.hidden_states.measure_states", None)
    for remove in (1, 2):
        out = tmp_path / f"out-{remove}"
        _run(command, model, out, *options, "-o", f"remove={remove}", "--statistics", saved)
        assert folder_bytes(out) == folder_bytes(tmp_path / f"expected-{remove}")


def test_statistics_of_another_text_or_model_are_refused(
    models: dict[str, Path], tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    saved = tmp_path / "saved.safetensors"
    arguments = ("-m", "depth", "-o", "score=influence", "-q")
    first = ("prune", models["llama-tied"], tmp_path / "a", *arguments, "--calibration", tokens_file)
    assert command(*first, "--save-statistics", saved).code == 0
    other = tmp_path / "other.safetensors"
    save_file({"input_ids": token_ids(1)}, other)
    for model, text, told in (
        (models["llama-tied"], other, "other inputs than these: calibration tokens"),
        (models["mpt"], tokens_file, "other inputs than these: model"),
    ):
        out = tmp_path / f"out-{model.name}"
        refused = command("prune", model, out, *arguments, "--calibration", text, "--statistics", saved)
        assert refused.code == 2
        assert told in " ".join(refused.stderr.split())
        assert not list(tmp_path.glob("out-*")), "what is refused leaves nothing behind"
    for options, told in (
        (("--save-statistics", saved), "exists already"),
        (("--statistics", tmp_path / "none"), "is not there"),
        (("-o", "which=1", "--statistics", saved), "measures nothing"),
    ):
        refused = command("prune", models["mpt"], tmp_path / "b", *arguments, *options)
        assert refused.code == 2
        assert told in " ".join(refused.stderr.split())
    refused = command("prune", models["mpt"], tmp_path / "b", "-m", "wanda", "--statistics", saved)
    assert refused.code == 2
    assert "decides layer by layer" in " ".join(refused.stderr.split())


def test_a_dry_run_tells_the_sizes_that_the_run_reports(
    models: dict[str, Path], tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    options = ("-m", "depth", "-s", "0.4", "-o", "refit=none", "--calibration", tokens_file)
    plan = command("prune", models["mpt"], tmp_path / "out", *options, "--dry-run", "--json").json
    assert not (tmp_path / "out").exists()
    structure = _run(command, models["mpt"], tmp_path / "out", *options[2:])
    assert plan["before"] == structure["before"]
    assert plan["after"] == structure["after"]
    assert plan["asked"] == structure["asked"]
    shown = command("prune", models["mpt"], tmp_path / "other", *options, "--dry-run").stdout
    assert "forward passes" in shown
    assert "KV cache" in shown
