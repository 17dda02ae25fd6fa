"""Packed in, packed out: experts and blocks go, codes, scales and biases of what stays are bit-identical."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from prune_cli.model.open_checkpoint import open_checkpoint
from prune_cli.packed.dequantised import Dequantised
from tests import packed_files as packed
from tests.conftest import RunCommand, token_ids
from tests.test_packed import INT4, as_bytes, dequantised, done, perplexity_of, report, weights
from tests.tiny import save_tiny

KEPT = re.compile(r"experts (.*)")


def is_expert(name: str, tensor: torch.Tensor) -> bool:
    return ".experts." in name and tensor.ndim == 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FP8 of all linear layers of a mixture, INT4 of its experts alone, gpt-oss in MXFP4; lists name blocks."""
    tmp = tmp_path_factory.mktemp("packed")
    sizes = {"moe_intermediate_size": 32, "mlp_only_layers": []}
    mixture = save_tiny(tmp / "mixture", "qwen3_moe", dtype=torch.bfloat16, **sizes)
    not_in_block_0 = ["lm_head", "model.layers.0.self_attn", *(f"model.layers.{block}.mlp.gate" for block in range(3))]
    fp8 = {**packed.FP8_SCHEME, "modules_to_not_convert": not_in_block_0}
    experts_only = {
        **INT4,
        "ignore": ["lm_head", "re:.*self_attn.*", *(f"model.layers.{b}.mlp.gate" for b in range(3))],
    }
    plain_gpt = save_tiny(tmp / "plain-gpt", "gpt_oss", dtype=torch.bfloat16)
    return {
        "block-fp8": packed.pack_folder(
            mixture,
            tmp / "fp8",
            packed.block_fp8(),
            fp8,
            lambda name, tensor: packed.is_linear(name, tensor) and "layers.0.self_attn" not in name,
        ),
        "int4": packed.pack_folder(mixture, tmp / "int4", packed.pack_quantized(), experts_only, is_expert),
        "gpt-oss": packed.pack_gpt_oss(plain_gpt, tmp / "gpt"),
    }


def scheme(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def check_loads_as_told(command: RunCommand, kind: str, out: Path, tokens_file: Path) -> None:
    told = report(out)["evaluation"]["after"]["perplexity"]
    ways = {"block-fp8": FineGrainedFP8Config(dequantize=True), "gpt-oss": Mxfp4Config(dequantize=True)}
    if kind in ways:
        assert told == pytest.approx(perplexity_of(dequantised(out, ways[kind]), token_ids()), rel=1e-5)
    else:  # transformers needs a package more for this one
        again = done(command, "eval", out, "--data", tokens_file, "--json").json["evaluation"]["perplexity"]
        assert told == pytest.approx(again, rel=1e-6)


@pytest.mark.parametrize("kind", ["int4", "gpt-oss"])
def test_experts(command: RunCommand, models: dict[str, Path], tokens_file: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    texts = ("--calibration", tokens_file, "--eval", tokens_file)
    done(command, "prune", models[kind], out, "--method", "experts", "-o", "keep=2", *texts, "--quiet")
    before, after = weights(models[kind]), weights(out)
    removed = {line["block"]: line["removed"] for line in report(out)["structure"]["blocks"]}
    for name, tensor in after.items():
        block = re.search(r"layers\.(\d+)\.", name)
        gone = [] if block is None else [int(e) for e in removed[int(block[1])].removeprefix("experts ").split(", ")]
        stay = [expert for expert in range(4) if expert not in gone]
        single = re.search(r"experts\.(\d+)\.", name)
        if single is not None:
            source = before[name.replace(single[0], f"experts.{stay[int(single[1])]}.")]
        elif block is not None and ("experts" in name or re.search(r"mlp\.(gate|router)\.", name)):
            source = before[name]
            source = torch.stack([source[expert] for expert in stay])
        else:
            source = before[name]
        assert torch.equal(as_bytes(tensor), as_bytes(source)), name
    assert scheme(out) == scheme(models[kind])
    check_loads_as_told(command, kind, out, tokens_file)


@pytest.mark.parametrize("kind", ["block-fp8", "int4"])
def test_depth(command: RunCommand, models: dict[str, Path], tokens_file: Path, tmp_path: Path, kind: str) -> None:
    out, which = tmp_path / "out", 1
    options = ("-o", f"which={which}", "--eval", tokens_file, "--quiet")
    done(command, "prune", models[kind], out, "--method", "depth", *options)
    before, after = weights(models[kind]), weights(out)
    number = dict(enumerate(block for block in range(3) if block != which))
    for name, tensor in after.items():
        source = re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{number[int(found[1])]}.", name)
        assert torch.equal(as_bytes(tensor), as_bytes(before[source])), name
    assert len(after) == len([name for name in before if f"layers.{which}." not in name])
    expected = scheme(models[kind])
    for key in ("modules_to_not_convert", "ignore"):
        if key in expected:
            expected[key] = [
                re.sub(r"layers\.2\.", "layers.1.", entry) for entry in expected[key] if f"layers.{which}." not in entry
            ]
    assert scheme(out) == expected
    check_loads_as_told(command, kind, out, tokens_file)


def test_lists_that_cannot_be_renumbered(
    command: RunCommand, models: dict[str, Path], tmp_path: Path, tokens_file: Path
) -> None:
    config = json.loads((models["block-fp8"] / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", r"model\.layers\.[0]\.self_attn", "mlp.gate"]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in models["block-fp8"].iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    options = ("--method", "depth", "-o", "which=0", "--quiet")
    result = command("prune", folder, tmp_path / "out", *options)
    assert result.code == 2
    assert "lists 'model" in result.stderr
    assert "use --packed bf16" in result.stderr
    done(command, "prune", folder, tmp_path / "out", *options, "--packed", "bf16", "-o", "refit=none")


def test_width_writes_plain_weights(
    command: RunCommand, models: dict[str, Path], tmp_path: Path, tokens_file: Path
) -> None:
    plain = save_tiny(tmp_path / "plain", "llama-untied", dtype=torch.bfloat16)
    folder = packed.pack_folder(plain, tmp_path / "packed", packed.block_fp8(), packed.FP8_SCHEME)
    options = ("--method", "width", "--calibration", tokens_file, "-o", "multiple=8", "--quiet")
    result = command("prune", folder, tmp_path / "out", *options, "--packed", "keep")
    assert result.code == 2
    assert "use --packed bf16" in " ".join(result.stderr.split())
    done(command, "prune", folder, tmp_path / "out", *options)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_structured_bf16(command: RunCommand, models: dict[str, Path], tmp_path: Path, tokens_file: Path) -> None:
    out = tmp_path / "out"
    options = ("--method", "experts", "-o", "keep=2", "--calibration", tokens_file, "--packed", "bf16", "--quiet")
    done(command, "prune", models["gpt-oss"], out, *options)
    checkpoint = open_checkpoint(models["gpt-oss"])
    assert isinstance(checkpoint, Dequantised)
    assert not isinstance(open_checkpoint(out), Dequantised)
    name = "model.layers.0.mlp.experts.down_proj"
    gone = report(out)["structure"]["blocks"][0]["removed"].removeprefix("experts ").split(", ")
    stay = [expert for expert in range(4) if str(expert) not in gone]
    assert torch.equal(weights(out)[name], checkpoint.read(name)[stay])
