"""--method width narrows every expert by its own tokens: plain transformers loads what a slow reference says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.test_resume import _stop_when
from tests.tiny import load_plain, save_tiny

# Experts apart; with an expert that all tokens see, of a width of its own or twice theirs; in one tensor, interleaved.
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "deepseek_v3": {"n_shared_experts": 2},
    "gpt_oss": {},
    "granitemoe": {},
}
IDS = token_ids(samples=16)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.safetensors"
    save_file({"input_ids": IDS}, path)
    return path


def _inner(experts: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What the last layer of an expert gets."""
    weight = experts.gate_up_proj[expert]
    if experts.is_transposed:
        return experts._apply_gate(rows @ weight + experts.gate_up_proj_bias[expert])
    gate, up = (rows @ weight.T).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def _zero(weight: torch.Tensor, inner: torch.Tensor) -> None:
    """Half of the inputs of a layer (out, in), those with the lowest |W| ||x||, get zeros."""
    score = weight.abs().sum(0) * inner.square().sum(0).sqrt()
    weight[:, score.argsort(descending=True, stable=True)[len(score) // 2 :]] = 0


@torch.no_grad()
def zeroed(folder: Path) -> nn.Module:
    """The dense model with zeros in place of the channels that wanda scores lowest, block after block."""
    model = load_plain(folder)
    for block in model.model.layers:
        seen: dict[nn.Module, list[torch.Tensor]] = {}
        mlps = [m for m in block.modules() if hasattr(m, "gate_up_proj") and getattr(m, "num_experts", None)]
        plain = [m for m in block.modules() if isinstance(getattr(m, "down_proj", None), nn.Linear)]

        def see(module: nn.Module, arguments: Any, seen: dict[nn.Module, list[torch.Tensor]] = seen) -> None:
            seen[module] = list(arguments)

        hooks = [module.register_forward_pre_hook(see) for module in (*mlps, *(mlp.down_proj for mlp in plain))]
        model(IDS)
        for hook in hooks:
            hook.remove()
        for mlp in plain:
            _zero(mlp.down_proj.weight, seen[mlp.down_proj][0].flatten(0, -2))
        for experts in mlps:
            hidden, chosen = seen[experts][0].flatten(0, -2), seen[experts][1]
            for expert in range(experts.num_experts):
                rows = hidden[(chosen == expert).any(-1)]
                inner = _inner(experts, expert, rows if len(rows) >= 32 else hidden)
                down = experts.down_proj[expert]
                _zero(down.T if experts.is_transposed else down, inner)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_expert_loses_what_matters_least_to_its_own_tokens(
    kind: str, tmp_path: Path, calibration: Path, command: RunCommand
) -> None:
    folder, out = save_tiny(tmp_path / "model", kind, tokenizer=False, **KINDS[kind]), tmp_path / "out"
    result = command(
        "prune", folder, out, "-m", "width", "-s", 0.5, "-o", "score=wanda", "-o", "refit=none", "-o", "multiple=4",
        "-q", "--json",
        "--calibration", calibration, "--batch-size", 16,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    model, told = loaded
    assert not any(told.values()), told
    torch.testing.assert_close(model(IDS).logits, zeroed(folder)(IDS).logits, rtol=1e-4, atol=1e-5)
    shares = result.json["structure"]["removed_shares"]
    assert shares["channels of every expert"] == 0.5
    assert ("channels of the shared experts" in shares) == (kind in ("qwen2_moe", "deepseek_v3"))


def test_a_fit_is_better_than_none_and_a_stopped_run_goes_on(
    tmp_path: Path, calibration: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe", tokenizer=False)
    told = ["-m", "width", "-s", 0.25, "-q", "--calibration", calibration]
    losses: dict[str, float] = {}
    for refit in ("all", "none"):
        out = tmp_path / refit
        assert command("prune", folder, out, *told, "-o", f"refit={refit}").code == 0
        report = json.loads((out / "prune_report.json").read_text())
        errors = [each["output_error"] for each in report["tensors"] if ".experts.3.down_proj" in each["name"]]
        losses[refit] = sum(errors)
    assert losses["all"] < losses["none"]
    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        _stop_when(patch, 2, half_written=True)
        assert command("prune", folder, again, *told).code == 1
    assert command("prune", folder, again, *told, "--resume").code == 0
    assert folder_bytes(again) == folder_bytes(tmp_path / "all")


def test_sizes_of_their_own_are_refused_for_experts(tmp_path: Path, calibration: Path, command: RunCommand) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral", tokenizer=False)
    options = ["-m", "width", "-s", 0.5, "-o", "uniform=false", "--calibration", calibration]
    result = command("prune", folder, tmp_path / "out", *options)
    assert result.code == 2
    assert "sizes of their own, which experts cannot have" in result.stderr
