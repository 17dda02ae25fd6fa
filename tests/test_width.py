"""--method width end to end: the outputs load in plain transformers and compute what they should."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import kl_div

from prune_cli.checkpoint.reader import Checkpoint
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.round_trips import Loaded, load_elsewhere
from tests.test_resume import _stop_when
from tests.tiny import load_plain, save_tiny

KINDS = (
    "llama-untied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "opt", "gpt2", "gpt_neox", "granite",
    "olmo2",
)  # fmt: skip
# What these can lose; the others lose channels and heads.
ONLY: dict[str, str] = dict.fromkeys(("opt", "gpt2", "gpt_neox", "olmo2"), "mlp")
# The map that reads the channels and the one that makes them, where they are not called as in Llama.
READS = {
    "opt": ("fc2", "fc1"),
    "gpt2": ("mlp.c_proj", "mlp.c_fc"),
    "gpt_neox": ("mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
    "phi3": ("mlp.down_proj", "mlp.gate_up_proj"),
}
IDS = token_ids(seed=5, samples=2, length=12)
TEXT = token_ids(samples=24)


def narrow(command: RunCommand, model: Path, out: Path, *options: object) -> Any:
    result = command("prune", model, out, "-m", "width", "-q", "--json", *options)
    assert result.code == 0, result.stderr
    return result.json


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.safetensors"
    save_file({"input_ids": TEXT}, path)
    return path


@torch.no_grad()
def kl_from_dense(dense: Path, out: Path) -> float:
    """On the calibration text, per token."""
    theirs, ours = (load_plain(folder)(TEXT).logits.log_softmax(-1).flatten(0, 1) for folder in (dense, out))
    return float(kl_div(ours, theirs, reduction="batchmean", log_target=True))


@torch.no_grad()
def zeroed_logits(dense: Path, out: Path, kind: str) -> torch.Tensor:
    """Of the dense model with zeros where the narrow model has lost what its maps would read; values are copied."""
    model, narrow = load_plain(dense), load_plain(out)
    small = dict(narrow.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.shape == small[name].shape:
            parameter.copy_(small[name])
    reads, makes = READS.get(kind, ("mlp.down_proj", "mlp.up_proj"))
    _zero(model, small, reads, makes, transposed=kind == "gpt2")
    if kind not in ONLY:
        makes = "self_attn.qkv_proj" if kind == "phi3" else "self_attn.q_proj"
        _zero(model, small, "self_attn.o_proj", makes, transposed=False)
    return model(IDS).logits


def _zero(model: Any, small: Mapping[str, torch.Tensor], reads: str, makes: str, *, transposed: bool) -> None:
    for name, weight in model.named_parameters():
        if not name.endswith(f".{reads}.weight") or weight.shape == small[name].shape:
            continue
        rows = model.get_parameter(name.replace(reads, makes))
        left = small[name.replace(reads, makes)]
        whole, part, axis = (rows.T, left.T, 0) if transposed else (rows, left, 1)
        count, kept = small[name].shape[axis], []
        for row in part[:count]:
            kept.append(int((whole[: weight.shape[axis]] == row).all(1).nonzero()[0]))
        value = torch.zeros_like(weight).index_copy_(axis, torch.tensor(kept), small[name])
        weight.copy_(value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> dict[str, tuple[Path, Path, Loaded]]:
    """Of every kind the dense folder, the narrow one, and what plain transformers made of it elsewhere."""
    from typer.testing import CliRunner

    from prune_cli.cli import app

    base = tmp_path_factory.mktemp("width")
    folders = {}
    for kind in KINDS:
        dense, out = save_tiny(base / kind, kind), base / f"{kind}-narrow"
        options = ["-s", "0.5", "-o", f"parts={ONLY.get(kind, 'both')}", "-o", "refit=consumers", "-q"]
        arguments = ["prune", str(dense), str(out), "-m", "width", *options, "--calibration", str(calibration)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        folders[kind] = (dense, out)
    loaded = load_elsewhere({kind: out for kind, (_, out) in folders.items()}, IDS, base / "elsewhere")
    return {kind: (dense, out, loaded[kind]) for kind, (dense, out) in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_computes_what_the_dense_model_does_with_zeros(
    kind: str, made: dict[str, tuple[Path, Path, Loaded]]
) -> None:
    dense, out, loaded = made[kind]
    loaded.is_whole()
    torch.testing.assert_close(loaded.logits, zeroed_logits(dense, out, kind), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert (load_plain(dense)(IDS).logits - loaded.logits).abs().max() > 0.01, "something was removed"


def test_the_report_tells_the_shares_apart(llama: Path, tmp_path: Path, calibration: Path, command: RunCommand) -> None:
    report = narrow(command, llama, tmp_path / "out", "-s", 0.25, "--calibration", calibration, "--eval", calibration)
    structure = report["structure"]
    entries = Checkpoint.open(tmp_path / "out").entries
    assert entries["model.layers.1.mlp.down_proj.weight"].shape == (32, 48)
    assert entries["model.layers.1.mlp.gate_proj.weight"].shape == (48, 32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 48
    lost = 3 * 3 * 16 * 32
    before = Checkpoint.open(llama).entries
    all_of_them = sum(entry.count for entry in before.values())
    in_blocks = sum(entry.count for name, entry in before.items() if ".layers." in name)
    shares = list(structure["removed_shares"].values())
    assert shares == pytest.approx([0.25, lost / in_blocks, lost / all_of_them])
    assert "25 %" in structure["asked"]
    assert structure["before"]["parameters"] - structure["after"]["parameters"] == lost
    assert [block["removed"] for block in structure["blocks"]] == ["16 of 64 channels of the MLP"] * 3
    assert all(0 < block["scores"]["output_error_mlp"] < 1 for block in structure["blocks"])
    assert report["evaluation"]["after"]["perplexity"] > 0


@pytest.mark.parametrize(("refit", "block"), [("all", 1), ("none", 2)])
def test_a_stopped_run_continues_to_the_same_bytes(
    refit: str, block: int, llama: Path, tmp_path: Path, calibration: Path, command: RunCommand
) -> None:
    options = ["-m", "width", "-s", 0.5, "-o", "parts=both", "-o", f"refit={refit}", "--calibration", calibration, "-q"]
    assert command("prune", llama, tmp_path / "expected", *options).code == 0
    with pytest.MonkeyPatch.context() as patch:
        _stop_when(patch, block, half_written=False)
        assert command("prune", llama, tmp_path / "out", *options).code == 1
    resumed = command("prune", llama, tmp_path / "out", *options, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")


def test_magnitude_needs_no_text_and_keeps_values(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    options = ["-o", "score=magnitude", "-o", "refit=none", "-s", 0.5]
    report = narrow(command, llama, tmp_path / "out", *options)
    assert report["calibration"] is None
    before, after = Checkpoint.open(llama), Checkpoint.open(tmp_path / "out")
    for block in range(3):
        up, gate, down = (f"model.layers.{block}.mlp.{name}_proj.weight" for name in ("up", "gate", "down"))
        squares = sum(before.read(name).square().sum(1 - (name == down)) for name in (up, gate, down))
        assert isinstance(squares, torch.Tensor)
        kept = squares.argsort(descending=True)[:32].sort().values
        assert torch.equal(after.read(down), before.read(down)[:, kept])
        assert torch.equal(after.read(up), before.read(up)[kept])
        assert torch.equal(after.read(gate), before.read(gate)[kept])


def test_biases_that_exist_take_the_mean_of_what_is_lost(
    tmp_path: Path, calibration: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", "opt")
    options = ["-s", 0.5, "--calibration", calibration, "-o", "score=flap"]
    narrow(command, model, tmp_path / "bias", *options, "-o", "refit=bias")
    narrow(command, model, tmp_path / "none", *options, "-o", "refit=none")
    name = "model.decoder.layers.0.fc2."
    folders = {label: Checkpoint.open(tmp_path / label) for label in ("model", "bias", "none")}
    assert torch.equal(folders["bias"].read(name + "weight"), folders["none"].read(name + "weight"))
    assert torch.equal(folders["none"].read(name + "bias"), folders["model"].read(name + "bias"))
    assert not torch.allclose(folders["bias"].read(name + "bias"), folders["model"].read(name + "bias"))


def test_a_better_fit_follows_the_dense_model(
    llama: Path, tmp_path: Path, calibration: Path, command: RunCommand
) -> None:
    """The text is the one it was fitted on: every step of the way must bring it nearer to the dense model."""
    kl = {}
    for refit in ("none", "consumers", "all"):
        narrow(command, llama, tmp_path / refit, "-s", 0.25, "--calibration", calibration, "-o", f"refit={refit}")
        kl[refit] = kl_from_dense(llama, tmp_path / refit)
    assert kl["all"] < kl["consumers"] < kl["none"]


@pytest.mark.parametrize(("kind", "part"), [("gemma2", "both"), ("olmo2", "mlp"), ("mixtral", "heads")])
def test_where_maps_do_not_add_to_the_stream_a_fit_is_better_than_none(
    kind: str, part: str, tmp_path: Path, calibration: Path, command: RunCommand
) -> None:
    """Norms on outputs, and experts: no map makes up for what the residual stream has lost."""
    model, kl = save_tiny(tmp_path / "model", kind, shards=False), {}
    for refit in ("none", "all"):
        options = ["-s", 0.5, "-o", f"parts={part}", "-o", f"refit={refit}", "--calibration", calibration]
        narrow(command, model, tmp_path / refit, *options)
        kl[refit] = kl_from_dense(model, tmp_path / refit)
    assert kl["all"] < kl["none"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("olmo2", ["-o", "parts=heads", "-s", "0.5"], "changes what the others compute"),
        ("bloom", [], "no key for the MLP's width"),
        ("llama-untied", ["-o", "refit=bias"], "have none"),
        ("llama-untied", ["-s", "0.01"], "rounds to none"),
        ("llama-untied", ["-o", "multiple=100"], "more than the 64"),
        ("llama-untied", ["--pattern", "2:4"], "--pattern"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    kind: str, options: list[str], message: str, tmp_path: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", kind)
    refused = command("prune", model, tmp_path / "out", "-m", "width", *options)
    assert refused.code == 2
    assert message in " ".join(refused.stderr.split())
    assert not (tmp_path / "out.partial").exists()
