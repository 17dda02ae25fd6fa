"""DeepSeek V4 as it is published: experts in FP4 by 32, the rest in FP8, and a table that names experts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import packed_files as packed
from tests.conftest import RunCommand, token_ids
from tests.test_depth_rules import _V4
from tests.test_packed import as_bytes, done, perplexity_of, report, twin_of, weights
from tests.tiny import load_plain

pytestmark = pytest.mark.filterwarnings("ignore")
_FP8 = re.compile(r"layers\.\d+\.(attn\.w|ffn\.shared_experts\.w)\w+\.weight")
_SCHEME = {"quant_method": "fp8", "weight_block_size": [16, 16], "expert_dtype": "fp4", "scale_fmt": "ue8m0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v4")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("deepseek_v4", **{**_V4, "moe_intermediate_size": 32})
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "plain")
    fp8 = packed.block_fp8(e8m0=True, ending=".scale")

    def pack(weight: torch.Tensor) -> packed.Tensors:
        return packed.fp4_of_32(weight) if tuple(weight.shape) == (32, 32) else fp8(weight)

    def which(name: str, tensor: torch.Tensor) -> bool:
        return ".experts." in name or bool(_FP8.search(name) and "compressor" not in name and tensor.shape != (32, 32))

    return packed.pack_folder(folder / "plain", folder / "packed", pack, _SCHEME, which)


def test_eval_as_transformers(model: Path, command: RunCommand, tokens_file: Path, tmp_path: Path) -> None:
    found = done(command, "eval", model, "--data", tokens_file, "--json").json["evaluation"]["perplexity"]
    assert found == pytest.approx(perplexity_of(load_plain(twin_of(model, tmp_path / "twin")), token_ids()), rel=1e-4)


def test_zeros_go_into_the_codes(model: Path, command: RunCommand, tokens_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(command, "prune", model, out, "--calibration", tokens_file, "--eval", tokens_file, "-q")
    before, after = weights(model), weights(out)
    pruned = {each["name"]: each["sparsity"] for each in report(out)["tensors"] if each["action"] == "pruned"}
    assert sum(".experts." in name for name in pruned) == 4 * 4 * 3
    assert min(pruned.values()) >= 0.5 - 1e-9
    for name, tensor in after.items():
        if name not in pruned:
            assert torch.equal(as_bytes(tensor), as_bytes(before[name])), name
    twin = perplexity_of(load_plain(twin_of(out, tmp_path / "twin")), token_ids())
    assert report(out)["evaluation"]["after"]["perplexity"] == pytest.approx(twin, rel=1e-4)


def test_experts_go_and_the_table_follows(model: Path, command: RunCommand, tokens_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = ("--calibration", tokens_file, "--eval", tokens_file)
    done(command, "prune", model, out, "-m", "experts", "-o", "keep=3", *data, "-q")
    before, after = weights(model), weights(out)
    codes = {as_bytes(tensor).numpy().tobytes() for name, tensor in before.items() if ".experts." in name}
    kept = [tensor for name, tensor in after.items() if ".experts." in name]
    assert len(kept) == 4 * 3 * 3 * 2
    assert all(as_bytes(tensor).numpy().tobytes() in codes for tensor in kept)
    tables = [tensor for name, tensor in after.items() if name.endswith("tid2eid")]
    assert tables
    assert all(0 <= int(table.min()) <= int(table.max()) < 3 for table in tables)
    twin = perplexity_of(load_plain(twin_of(out, tmp_path / "twin")), token_ids())
    assert report(out)["evaluation"]["after"]["perplexity"] == pytest.approx(twin, rel=1e-4)
