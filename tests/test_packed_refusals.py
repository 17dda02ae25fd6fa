"""What is wrong with a packed model is told in one sentence that names the tensor, before any output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import packed_files as packed
from tests.conftest import RunCommand
from tests.tiny import save_tiny

PROJECTION = "model.layers.1.mlp.up_proj"
EXPERTS = "model.layers.1.mlp.experts.down_proj"
INT4 = packed.compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16)
INT8 = packed.compressed("int-quantized", num_bits=4, type="int", strategy="channel")
Damage = Callable[[Path], object]


def put(name: str, tensor: torch.Tensor | None) -> Damage:
    return lambda folder: packed.change(folder, {name: tensor})


def edit(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            stored = load_file(file)
            if name in stored:
                packed.change(folder, {name: how(stored[name].clone())})

    return damage


def config(**scheme: Any) -> Damage:
    """Change entries of the quantization_config; None takes one away."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        whole = json.loads(path.read_text())
        merged = {**whole["quantization_config"], **scheme}
        whole["quantization_config"] = {key: value for key, value in merged.items() if value is not None}
        path.write_text(json.dumps(whole))

    return damage


def no_scheme(folder: Path) -> None:
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    del whole["quantization_config"]
    path.write_text(json.dumps(whole))


def group(**weights: Any) -> Damage:
    changed = {**INT4["config_groups"]["group_0"]}
    changed["weights"] = {**changed["weights"], **weights}
    return config(config_groups={"group_0": changed})


def with_value(at: tuple[int, ...], value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.view(torch.uint8) if tensor.element_size() == 1 and tensor.is_floating_point() else tensor
        raw[at] = value
        return tensor

    return change


CASES: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "no scales": ("fp8", put(f"{PROJECTION}.weight_scale_inv", None), (f"{PROJECTION}.weight_scale_inv is missing",)),
    "shape of scales": (
        "fp8",
        put(f"{PROJECTION}.weight_scale_inv", torch.ones(3, 2)),
        (f"{PROJECTION}.weight_scale_inv has the shape [3, 2], expected [4, 2]",),
    ),
    "no codes": ("fp8", put(f"{PROJECTION}.weight", None), (f"{PROJECTION}.weight_scale_inv is a scale",)),
    "NaN scales": (
        "fp8",
        put(f"{PROJECTION}.weight_scale_inv", torch.full((4, 2), torch.nan)),
        (f"{PROJECTION}.weight_scale_inv holds scales that are NaN",),
    ),
    "NaN codes": (
        "fp8",
        edit(f"{PROJECTION}.weight", with_value((5, 5), 0x7F)),
        (f"{PROJECTION}.weight holds codes that stand for no number",),
    ),
    "E8M0 of 255": (
        "e8m0",
        edit(f"{PROJECTION}.weight_scale_inv", with_value((1, 1), 255)),
        (f"{PROJECTION}.weight_scale_inv holds E8M0 scales of 255",),
    ),
    "block size": ("fp8", config(weight_block_size=[8, 8]), ("weight_scale_inv has the shape", "weight_block_size")),
    "no block size": ("fp8", config(weight_block_size="large"), ("weight_block_size = 'large'",)),
    "not converted": ("fp8", config(modules_to_not_convert=["up_proj"]), ("mlp.up_proj.weight is FP8", "'up_proj'")),
    "experts said to be FP4": ("moe", config(expert_dtype="fp4"), (".experts.0.", "expert_dtype fp4")),
    "no config": ("fp8", no_scheme, ("self_attn.k_proj.weight", "no quantization_config")),
    "config alone": ("plain", lambda folder: None, ("says that the weights are fp8, but no tensor is",)),
    "method": ("fp8", config(quant_method="awq"), ("already quantised (awq)", "not read here")),
    "no scales of blocks": ("gpt-oss", put(f"{EXPERTS}_scales", None), (f"{EXPERTS}_scales is missing",)),
    "no blocks": ("gpt-oss", put(f"{EXPERTS}_blocks", None), (f"{EXPERTS}_scales has no _blocks",)),
    "scales of blocks": (
        "gpt-oss",
        put(f"{EXPERTS}_scales", torch.zeros(4, 32, 3, dtype=torch.uint8)),
        (f"{EXPERTS}_scales has the shape [4, 32, 3], expected [4, 32, 2]",),
    ),
    "scales of 255": (
        "gpt-oss",
        edit(f"{EXPERTS}_scales", with_value((1, 1, 1), 255)),
        (f"{EXPERTS}_scales holds E8M0 scales of 255",),
    ),
    "dtype of blocks": (
        "gpt-oss",
        edit(f"{EXPERTS}_blocks", lambda tensor: tensor.to(torch.int16)),
        (f"{EXPERTS}_blocks is stored as I16", "mxfp4"),
    ),
    "no scales of words": ("int4", put(f"{PROJECTION}.weight_scale", None), (f"{PROJECTION}.weight_scale is missing",)),
    "no words": ("int4", put(f"{PROJECTION}.weight_packed", None), (f"{PROJECTION}.weight_scale has no",)),
    "no shape": ("int4", put(f"{PROJECTION}.weight_shape", None), (f"{PROJECTION}.weight_shape is missing",)),
    "shape": (
        "int4",
        put(f"{PROJECTION}.weight_shape", torch.tensor([64, 64])),
        (f"{PROJECTION}.weight_shape says [64, 64]", "[64, 4]"),
    ),
    "group size": ("int4", group(group_size=8), ("weight_scale has the shape", "strategy group")),
    "bits": ("int4", group(num_bits=8), ("weight_shape says", "8 bits")),
    "odd bits": ("int4", group(num_bits=3), ("k_proj.weight_packed", "3-bit")),
    "zero points": ("int4", group(symmetric=False), ("weight_zero_point is missing",)),
    "ignored": ("int4", config(ignore=["lm_head", "re:.*up_proj"]), ("up_proj.weight_scale", "'re:.*up_proj'")),
    "targets": (
        "int4",
        config(config_groups={"group_0": {**INT4["config_groups"]["group_0"], "targets": ["re:.*down_proj"]}}),
        ("weight_scale is stored, but no group", "k_proj"),
    ),
    "format": ("int4", config(format="marlin-24"), ("already quantised (compressed-tensors marlin-24)",)),
    "sparse": (
        "int4",
        config(sparsity_config={"format": "sparse-24-bitmask"}),
        ("compressed-tensors sparse-24-bitmask",),
    ),
    "other format": ("int4", config(format="int-quantized"), ("k_proj.weight_packed", "int-quantized")),
    "groups": ("int4", config(config_groups=[]), ("config_groups",)),
    "order of groups": (
        "g_idx",
        lambda folder: None,
        ("self_attn.k_proj.weight_g_idx", "not read"),
    ),
    "codes beyond": (
        "int8",
        edit(f"{PROJECTION}.weight", with_value((2, 3), 100)),
        (f"{PROJECTION}.weight holds codes that stand for no number",),
    ),
}


# One that headers tell, and one that is seen when weights are read.
EVERYWHERE = ("no scales", "E8M0 of 255")


def _with_order(weight: torch.Tensor) -> packed.Tensors:
    return {**packed.pack_quantized()(weight), ".weight_g_idx": torch.zeros(weight.shape[1], dtype=torch.int32)}


def _small_ints(weight: torch.Tensor) -> packed.Tensors:
    codes, scales, _ = packed.whole_numbers(weight, 4, weight.shape[1], symmetric=True)
    return {".weight": codes, ".weight_scale": scales}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("models")
    llama = save_tiny(tmp / "llama", "llama-untied", dtype=torch.bfloat16)
    mixture = save_tiny(tmp / "mixture", "qwen3_moe", dtype=torch.bfloat16, moe_intermediate_size=32)
    gpt_oss = save_tiny(tmp / "plain-gpt-oss", "gpt_oss", dtype=torch.bfloat16)
    made: dict[str, tuple[Path, packed.Packer, dict[str, Any]]] = {
        "fp8": (llama, packed.block_fp8(), packed.FP8_SCHEME),
        "e8m0": (llama, packed.block_fp8(e8m0=True), packed.FP8_SCHEME),
        "moe": (mixture, packed.block_fp8(), packed.FP8_SCHEME),
        "int4": (llama, packed.pack_quantized(), INT4),
        "g_idx": (llama, _with_order, INT4),
        "int8": (llama, _small_ints, INT8),
    }
    folders = {name: packed.pack_folder(plain, tmp / name, pack, how) for name, (plain, pack, how) in made.items()}
    never = packed.pack_folder(llama, tmp / "none", packed.block_fp8(), packed.FP8_SCHEME, lambda *_: False)
    return {**folders, "plain": never, "gpt-oss": packed.pack_gpt_oss(gpt_oss, tmp / "gpt-oss")}


@pytest.mark.parametrize("case", CASES)
def test_refused(command: RunCommand, models: dict[str, Path], tokens_file: Path, tmp_path: Path, case: str) -> None:
    kind, damage, words = CASES[case]
    folder = shutil.copytree(models[kind], tmp_path / "model")
    damage(folder)
    options = ("--method", "magnitude", "--quiet")
    commands: list[tuple[object, ...]] = [("prune", folder, tmp_path / "out", *options)]
    if case in EVERYWHERE:
        commands.append(("inspect", folder))
        commands.append(("prune", folder, tmp_path / "out", "--packed", "bf16", *options))
        commands.append(("eval", folder, "--data", tokens_file))
    for arguments in commands:
        result = command(*arguments)
        assert result.code == 2, result.stdout + result.stderr
        told = " ".join(result.stderr.split())
        assert all(word in told for word in words), told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_packed_is_for_packed_models(command: RunCommand, llama: Path, tmp_path: Path) -> None:
    result = command("prune", llama, tmp_path / "out", "--method", "magnitude", "--packed", "keep")
    assert result.code == 2
    assert "is plain: leave it out" in " ".join(result.stderr.split())


def test_unknown_choice(command: RunCommand, llama: Path, tmp_path: Path) -> None:
    result = command("prune", llama, tmp_path / "out", "--packed", "fp4")
    assert result.code == 2
    assert "choose keep or bf16" in result.stderr
