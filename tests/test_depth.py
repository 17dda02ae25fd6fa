"""`--method depth`: the outputs load anywhere, and the blocks that go are the ones that the papers' rules name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prune_cli.checkpoint.file_names import partial_folder
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.cli import app
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.round_trips import Loaded, load_elsewhere, logits_without_blocks
from tests.tiny import save_tiny

KINDS = (
    "llama-tied", "llama-untied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "opt", "gpt2",
    "gpt_neox",
    "granite", "olmo2", "falcon-new", "falcon-old", "bloom", "cohere", "mpt", "mixtral", "qwen3_moe", "mamba",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind, shards=kind.startswith("llama")) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """All models without their middle block, loaded in a process of its own."""
    root = tmp_path_factory.mktemp("outputs")
    for kind, folder in models.items():
        done = CliRunner().invoke(
            app, ["prune", str(folder), str(root / kind), "-m", "depth", "-o", "which=1", "-o", "refit=none", "-q"]
        )
        assert done.exit_code == 0, done.output
    return load_elsewhere({kind: root / kind for kind in models}, token_ids(), root / "scratch")


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_is_the_dense_model_with_those_blocks_skipped(
    kind: str, models: dict[str, Path], loaded: dict[str, Loaded]
) -> None:
    loaded[kind].is_whole()
    assert loaded[kind].found["blocks"] == 2
    assert torch.equal(loaded[kind].logits, logits_without_blocks(models[kind], [1], token_ids()))


def _depth(command: RunCommand, model: Path, out: Path, tokens_file: Path, *options: object) -> Any:
    outcome = command("prune", model, out, "-m", "depth", "--calibration", tokens_file, "-q", *options)
    assert outcome.code == 0, outcome.stderr
    return json.loads((out / "prune_report.json").read_text())


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of five blocks."""
    return save_tiny(tmp_path_factory.mktemp("five") / "model", "llama-tied", num_hidden_layers=5)


def _removed(report: Any) -> list[int]:
    return [block["block"] for block in report["structure"]["blocks"] if block["new_block"] is None]


def test_a_share_of_the_blocks_is_rounded_and_the_report_says_so(
    five: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    report = _depth(
        command, five, tmp_path / "out", tokens_file, "-s", "0.3", "-o", "score=influence", "--eval", tokens_file
    )
    structure = report["structure"]
    assert len(_removed(report)) == 2
    assert "30 % of the 5 blocks removed, which is 2" in structure["asked"]
    assert (structure["units_before"], structure["units_after"]) == (5, 3)
    assert structure["removed_shares"]["blocks"] == pytest.approx(0.4)
    assert structure["removed_shares"]["parameters of the blocks"] == pytest.approx(0.4)
    before, after = structure["before"], structure["after"]
    written = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert after["parameters"] == sum(tensor.numel() for tensor in written.values())
    assert after["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert after["kv_cache_bytes_per_token"] == 3 * 2 * 2 * 8 * 4
    assert before["macs_per_token"] == sum(
        tensor.numel() for file in five.glob("*.safetensors") for tensor in load_file(file).values() if tensor.ndim == 2
    )
    assert report["evaluation"]["before"]["perplexity"] != report["evaluation"]["after"]["perplexity"]
    assert "less on disk" in report["gain"]
    page = (tmp_path / "out" / "prune_report.md").read_text()
    assert "Cache per token" in page
    assert "| gone | the whole block |" in page


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-o", "which=5"], "names block 5, but the model has 5"),
        (["-o", "which=3-1"], "is no list of blocks"),
        (["-o", "which=0-4"], "at least one must stay"),
        (["-o", "which=1", "-s", "0.2"], "leave one of them out"),
        (["-o", "remove=5"], "at least one must stay"),
        (["-o", "remove=2", "-s", "0.2"], "exclude each other"),
        (["-o", "remove=0"], "must be at least 1"),
        (["-s", "0"], "removes no block"),
        (["--pattern", "2:4"], "--pattern is for methods that make weights sparse"),
        (["--refine", "swaps"], "--refine is for methods"),
        (["--allocate", "owl"], "--allocate is for methods"),
        (["--target", "dense"], "--target is for methods"),
        (["--include", "*"], "--include is for methods"),
        (["--preset", "fast"], "--preset is for methods"),
        (["-o", "score=best"], "must be one of greedy, influence, angular"),
    ],
)
def test_refusals_come_before_any_work(
    options: list[str], told: str, five: Path, tmp_path: Path, command: RunCommand
) -> None:
    outcome = command("prune", five, tmp_path / "out", "-m", "depth", *options)
    assert outcome.code == 2
    assert told in " ".join(outcome.stderr.split())
    assert not partial_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(("score", "remove"), [("greedy", 1), ("influence", 2)])
def test_a_stopped_run_continues_to_the_same_bytes(
    score: str, remove: int, five: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    options = ["-o", f"remove={remove}", "-o", f"score={score}"]
    _depth(command, five, tmp_path / "expected", tokens_file, *options)
    out = tmp_path / "out"
    for stop_at in ("lay_out", "copy_side_files"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OutputFolder, stop_at, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            stopped = command(
                "prune", five, out, "-m", "depth", "--calibration", tokens_file, "-q", *options, "--resume"
            )
        assert stopped.code == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prune_cli.structured.depth.choose.Removals.losses", None)
        patch.setattr("prune_cli.structured.hidden_states.measure_states", None)
        _depth(command, five, out, tokens_file, *options, "--resume")
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")


@pytest.mark.parametrize("score", ["greedy", "influence"])
def test_losses_that_are_not_finite_choose_no_block(
    score: str, five: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    model = shutil.copytree(five, tmp_path / "huge")
    for path in model.glob("*.safetensors"):
        tensors = {n: t * 1e30 if "_proj" in n else t for n, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    asked = ("-m", "depth", "-o", f"score={score}", "--calibration", tokens_file, "-q")
    failed = command("prune", model, tmp_path / "out", *asked)
    assert failed.code == 1
    assert "not finite" in failed.stderr
    assert not (tmp_path / "out").exists()
