"""What --include and --exclude choose beyond the linear layers of the blocks, and what is never pruned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference
from tests.broken import SHARD, copy_of, refused
from tests.conftest import RunCommand, token_ids
from tests.tiny import load_plain, save_tiny


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _changed(before: Path, after: Path) -> set[str]:
    dense, pruned = _tensors(before), _tensors(after)
    assert dense.keys() == pruned.keys()
    return {name for name, tensor in pruned.items() if not torch.equal(tensor, dense[name])}


def _smallest_half_is_gone(dense: torch.Tensor, pruned: torch.Tensor) -> bool:
    return torch.equal(pruned, dense * reference.keep_per_tensor(dense.abs(), 0.5))


def test_the_default_is_every_linear_map_of_the_blocks(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    assert command("prune", llama, tmp_path / "out", "-m", "magnitude", "-q").code == 0
    expected = {name for name in _tensors(llama) if name.endswith("_proj.weight")}
    assert len(expected) == 21
    assert _changed(llama, tmp_path / "out") == expected


def test_patterns_narrow_add_and_take_out(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    chosen = ["--include", "*.1.*", "--include", "model.norm.weight", "--exclude", "*.[qkvo]_proj.*"]
    run = command("prune", llama, tmp_path / "out", "-m", "magnitude", *chosen, "--json")
    assert run.code == 0
    maps = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down", "gate")}
    assert _changed(llama, tmp_path / "out") == maps | {"model.norm.weight"}
    reasons = {t["name"]: t["reason"] for t in run.json["tensors"]}
    assert reasons["model.layers.1.self_attn.q_proj.weight"] == "excluded by --exclude"
    assert reasons["model.layers.0.self_attn.v_proj.weight"] == "excluded by --exclude"
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "not named by --include"
    assert reasons["lm_head.weight"] == "the output head is kept by default"
    assert reasons["model.embed_tokens.weight"] == "embeddings are kept by default"


@pytest.mark.parametrize(
    ("kind", "globs", "least"),
    [
        ("llama-untied", ["model.embed_tokens.weight"], 1),
        ("llama-untied", ["lm_head.weight", "*norm.weight"], 8),
        ("gpt_neox", ["*norm*", "*.bias"], 20),
        ("opt", ["*layer_norm*", "*.bias", "model.decoder.embed_positions.weight"], 20),
        ("gpt2", ["*.ln_*", "*.bias", "transformer.wpe.weight"], 20),
        ("mamba", ["*.conv1d.*", "*.A_log", "*.D"], 12),
    ],
)
def test_magnitude_takes_whatever_is_named(
    kind: str, globs: list[str], least: int, tmp_path: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", kind)
    chosen = [word for glob in globs for word in ("--include", glob)]
    plain = command("prune", model, tmp_path / "plain", "-m", "magnitude", "-q")
    more = command("prune", model, tmp_path / "out", "-m", "magnitude", *chosen, "-q")
    assert (plain.code, more.code) == (0, 0), more.stderr
    added = _changed(model, tmp_path / "out") - _changed(model, tmp_path / "plain")
    assert len(added) >= least
    dense, pruned = _tensors(model), _tensors(tmp_path / "out")
    for name in added:
        assert _smallest_half_is_gone(dense[name], pruned[name]), name


@pytest.mark.parametrize(("glob", "role"), [("model.embed_tokens.weight", "embedding"), ("model.norm.weight", "norm")])
def test_wanda_refuses_what_has_no_inputs(
    glob: str, role: str, llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    message = refused(command, llama, tmp_path / "out", "--calibration", tokens_file, "--include", glob)
    assert f"{glob} is no linear layer whose inputs could be measured ({role})" in message


@pytest.mark.parametrize("by", ["sublayer", "block"])
@torch.no_grad()
def test_wanda_prunes_the_head_by_its_own_inputs(
    by: str, llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    out = tmp_path / "out"
    arguments = ["--calibration", tokens_file, "--batch-size", 2, "--calibrate-by", by]
    run = command("prune", llama, out, *arguments, "--include", "lm_head.weight", "--json")
    assert run.code == 0, run.stderr
    pruned = load_plain(out)
    inputs = reference.run_with_inputs(pruned, token_ids().split(2), {"lm_head": pruned.lm_head})["lm_head"]
    dense = _tensors(llama)["lm_head.weight"]
    keep = reference.keep_per_row(reference.wanda_score(dense, reference.squared_norms(inputs)), 0.5)
    assert torch.equal(_tensors(out)["lm_head.weight"], dense * keep)
    report = next(t for t in run.json["tensors"] if t["name"] == "lm_head.weight")
    rows = torch.cat([tensor.flatten(0, 1) for tensor in inputs]).double()
    lost = (rows @ (dense * ~keep).T.double()).square().sum() / (rows @ dense.T.double()).square().sum()
    assert report["output_error"] == pytest.approx(float(lost), rel=1e-4)

    assert command("prune", llama, tmp_path / "plain", *arguments, "-q").code == 0
    assert _changed(tmp_path / "plain", out) == {"lm_head.weight"}


@pytest.fixture
def tied_twice(tmp_path: Path) -> Path:
    """A tied Llama whose head is stored beside its embedding."""
    model = save_tiny(tmp_path / "tied", "llama-tied", shards=False)
    tensors = load_file(model / SHARD)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / SHARD)
    return model


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize(
    "globs", [["lm_head.weight"], ["model.embed_tokens.weight"], ["lm_head.weight", "model.embed_tokens.weight"]]
)
def test_both_copies_of_a_tied_tensor_stay_the_same(
    globs: list[str], method: str, tied_twice: Path, tmp_path: Path, command: RunCommand
) -> None:
    chosen = [word for glob in globs for word in ("--include", glob)]
    assert command("prune", tied_twice, tmp_path / "out", "-m", method, *chosen, "-q").code == 0
    written = _tensors(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert int((written["lm_head.weight"] == 0).sum()) == written["lm_head.weight"].numel() // 2


def test_wanda_writes_a_tied_head_to_both_places(
    tied_twice: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    arguments = ["--calibration", tokens_file, "--include", "lm_head.weight", "-q"]
    assert command("prune", tied_twice, tmp_path / "out", *arguments).code == 0
    written = _tensors(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert int((written["lm_head.weight"] == 0).sum()) == written["lm_head.weight"].numel() // 2
    assert _changed(tied_twice, tmp_path / "out") >= {"lm_head.weight", "model.embed_tokens.weight"}


def test_a_head_that_only_says_it_is_tied_is_pruned_alone(whole: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(whole, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    run = command("prune", model, tmp_path / "out", "-m", "magnitude", "--include", "lm_head.weight", "-q")
    assert run.code == 0
    changed = _changed(model, tmp_path / "out")
    assert "lm_head.weight" in changed
    assert "model.embed_tokens.weight" not in changed


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_are_pruned_and_what_routes_is_kept(
    kind: str, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", kind)
    run = command("prune", model, tmp_path / "out", "--calibration", tokens_file, "--json")
    assert run.code == 0, run.stderr
    experts = {n for n, t in _tensors(model).items() if ".experts." in n and not n.endswith("bias")}
    changed = _changed(model, tmp_path / "out")
    assert experts <= changed
    assert {name for name in changed if "self_attn" in name}
    assert not {name for name in changed if "bias" in name or "gate.weight" in name or "router" in name}
    report = {t["name"]: t for t in run.json["tensors"]}
    assert {report[name]["role"] for name in experts} == {"expert"}
    assert {report[name]["sparsity"] for name in experts} == {0.5}
    assert all(0 < report[name]["output_error"] < 1 for name in experts)
    assert run.json["totals"]["sparsity_of_pruned"] == 0.5
    routers = [t for t in run.json["tensors"] if t["role"] == "router"]
    assert routers
    assert all(t["reason"] == "routers are kept by default" for t in routers)


def test_experts_of_an_unknown_kind_need_a_word_and_are_kept(
    tmp_path: Path, tokens_file: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_cli.model.expert_kinds._KINDS", ())
    model = save_tiny(tmp_path / "model", "granitemoe")
    message = refused(command, model, tmp_path / "out", "--calibration", tokens_file)
    assert "tensors of experts that are stored or computed in a way unknown here" in message
    assert "add --allow-unsupported" in message
    arguments = ["--calibration", tokens_file, "--allow-unsupported"]
    reason = "experts that are stored or computed in this way are not supported"
    assert reason in refused(command, model, tmp_path / "out", *arguments, "--include", "*_linear.weight")
    run = command("prune", model, tmp_path / "out", *arguments, "--json")
    assert run.code == 0, run.stderr
    kept = {t["name"]: t for t in run.json["tensors"] if t["role"] == "expert"}
    assert len(kept) == 6
    assert not _changed(model, tmp_path / "out") & kept.keys()
    assert {(t["action"], t["reason"]) for t in kept.values()} == {("kept", reason)}
