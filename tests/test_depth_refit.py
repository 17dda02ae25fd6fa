"""`--method depth -o refit=all`: what is left takes over for the blocks that are gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_cli.checkpoint.reader import Checkpoint
from tests import reference_depth
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.round_trips import load_elsewhere
from tests.test_resume import _stop_when
from tests.tiny import load_plain, save_tiny

DEMO = Path(__file__).parents[1] / "examples" / "demo-model"
# Tuples and biases, transposed maps, norms on outputs, experts, parallel blocks.
KINDS = ("llama-tied", "mpt", "gpt2", "gemma2", "mixtral", "gpt_neox")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    depth: dict[str, Any] = {"mpt": {"n_layers": 4}, "gpt2": {"n_layer": 4}}
    return {kind: save_tiny(root / kind, kind, **depth.get(kind, {"num_hidden_layers": 4})) for kind in KINDS}


def _run(command: RunCommand, model: Path, out: Path, *options: object) -> Any:
    outcome = command("prune", model, out, "-m", "depth", "-q", *options)
    assert outcome.code == 0, outcome.stderr
    return json.loads((out / "prune_report.json").read_text())


@pytest.fixture(scope="module")
def outputs(models: dict[str, Path], tokens_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All models without their second block, refitted; the first stays as it was."""
    from typer.testing import CliRunner

    from prune_cli.cli import app

    root = tmp_path_factory.mktemp("outputs")
    for kind, model in models.items():
        arguments = ["prune", model, root / kind, "-m", "depth", "-o", "which=1", "--calibration", tokens_file]
        done = CliRunner().invoke(app, [*map(str, arguments), "--eval", str(tokens_file), "-q"])
        assert done.exit_code == 0, done.output
    return {kind: root / kind for kind in models}


def test_outputs_load_elsewhere_and_compute_what_was_evaluated(outputs: dict[str, Path], tmp_path: Path) -> None:
    ids = token_ids()
    for kind, found in load_elsewhere(outputs, ids, tmp_path / "scratch").items():
        found.is_whole()
        loss = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
        report = json.loads((outputs[kind] / "prune_report.json").read_text())
        assert report["evaluation"]["after"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4), kind


@pytest.mark.parametrize("kind", KINDS)
def test_linear_maps_behind_the_removed_block_change_and_nothing_else(
    kind: str, models: dict[str, Path], outputs: dict[str, Path]
) -> None:
    report = json.loads((outputs[kind] / "prune_report.json").read_text())
    dense, written = Checkpoint.open(models[kind]), Checkpoint.open(outputs[kind])
    there = [tensor for tensor in report["tensors"] if tensor["action"] != "removed"]
    fitted = {tensor["name"] for tensor in there if tensor["action"] == "refitted"}
    for tensor in there:
        name, block = tensor["name"], tensor["block"]
        old = name if not block else name.replace(f".{block}.", f".{block + 1}.", 1)
        same = torch.equal(written.read(name), dense.read(old))
        assert same == (name not in fitted), name
        if tensor["role"] == "linear map":
            assert (name in fitted) == bool(block)
            assert (tensor["output_error"] is not None) == bool(block)
    alone = "do not make up for removed blocks" in " ".join(report["structure"]["notes"])
    assert alone == (kind in ("gemma2", "mixtral"))


def test_the_fit_is_the_least_squares_of_the_definition(
    models: dict[str, Path], tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    out = tmp_path / "out"
    _run(command, models["llama-tied"], out, "-o", "which=0", "--calibration", tokens_file, "-o", "alpha=0.6")
    name = "model.layers.{}.self_attn.o_proj.weight"
    expected = reference_depth.refitted_output_map(
        load_plain(models["llama-tied"]), load_plain(out), token_ids(), alpha=0.6, damping=0.1
    )
    torch.testing.assert_close(Checkpoint.open(out).read(name.format(0)), expected, rtol=1e-3, atol=1e-4)


def test_a_trained_model_loses_less(tmp_path: Path, command: RunCommand) -> None:
    losses = {}
    for refit in ("all", "none"):
        options = ("-o", "which=1", "-o", f"refit={refit}", "--samples", 32, "--seq-len", 64)
        report = _run(command, DEMO, tmp_path / refit, *options, "--eval", "builtin", "--eval-windows", 32)
        losses[refit] = report["evaluation"]["after"]["loss"]
    assert losses["all"] < losses["none"] - 0.1


def test_a_stopped_run_continues_to_the_same_bytes(
    models: dict[str, Path], tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    model, options = models["gpt2"], ("-o", "which=0", "--calibration", tokens_file)
    _run(command, model, tmp_path / "expected", *options)
    with pytest.MonkeyPatch.context() as patch:
        _stop_when(patch, 1, half_written=False)
        assert command("prune", model, tmp_path / "out", "-m", "depth", "-q", *options).code == 1
    resumed = _run(command, model, tmp_path / "out", *options, "--resume")
    assert [block["resumed"] for block in resumed["blocks"]] == [True, False, False]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")


def test_without_a_block_behind_it_nothing_is_fitted_and_the_report_says_so(
    models: dict[str, Path], tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    options = ("-o", "which=3", "--calibration", tokens_file)
    report = _run(command, models["llama-tied"], tmp_path / "all", *options)
    assert "Nothing was refitted" in report["structure"]["notes"][0]
    _run(command, models["llama-tied"], tmp_path / "none", *options, "-o", "refit=none")
    for file in (tmp_path / "none").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "all" / file.name).read_bytes()


def test_following_nothing_is_refused(models: dict[str, Path], tmp_path: Path, command: RunCommand) -> None:
    outcome = command("prune", models["gpt2"], tmp_path / "out", "-m", "depth", "-o", "alpha=0")
    assert outcome.code == 2
    assert "use -o refit=none" in outcome.stderr
