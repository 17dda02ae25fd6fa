"""Values of packed weights equal those of transformers' own dequantisation, and come back from new codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from prune_cli.model.open_checkpoint import open_checkpoint
from prune_cli.packed.codes import E2M1, E4M3, Int8, Int32Words
from prune_cli.packed.dequantised import Dequantised
from prune_cli.packed.weight import Parts
from tests import packed_files as packed
from tests.tiny import load_plain, save_tiny

COMPRESSED: dict[str, tuple[packed.Packer, dict[str, Any]]] = {
    "int4-groups": (
        packed.pack_quantized(),
        packed.compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16),
    ),
    "int4-channels": (
        packed.pack_quantized(group=None),
        packed.compressed("pack-quantized", num_bits=4, type="int", strategy="channel"),
    ),
    "int4-zero-points": (
        packed.pack_quantized(symmetric=False),
        packed.compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False),
    ),
    "int8-words": (
        packed.pack_quantized(bits=8),
        packed.compressed("pack-quantized", num_bits=8, type="int", strategy="group", group_size=16),
    ),
    "int8-channels": (
        packed.int_quantized(),
        packed.compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    ),
    "int8-zero-points": (
        packed.int_quantized(group=16, symmetric=False),
        packed.compressed("int-quantized", num_bits=8, type="int", strategy="group", group_size=16, symmetric=False),
    ),
    **{
        f"fp8-{strategy}": (
            packed.float_quantized(strategy),
            packed.compressed("float-quantized", num_bits=8, type="float", strategy=strategy, **more),
        )
        for strategy, more in {
            "tensor": {},
            "channel": {},
            "group": {"group_size": 16},
            "block": {"block_structure": [16, 16]},
        }.items()
    },
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bf16 in several shards."""
    return save_tiny(tmp_path_factory.mktemp("plain") / "model", "llama-untied", dtype=torch.bfloat16)


def opened(folder: Path) -> Dequantised:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, Dequantised)
    return checkpoint


def values(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = opened(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def as_transformers_loads(folder: Path, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    return dict(model.state_dict())


def as_plain(folder: Path, out: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters of a model that transformers loads from our values."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in values(folder).items()}, out / "model.safetensors")
    return dict(load_plain(out, dtype).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "pack", "scheme"),
    [
        ("llama-untied", packed.block_fp8(), packed.FP8_SCHEME),
        ("llama-untied", packed.block_fp8(e8m0=True), {**packed.FP8_SCHEME, "scale_fmt": "ue8m0"}),
        ("qwen3_moe", packed.block_fp8(block=8), {**packed.FP8_SCHEME, "weight_block_size": [8, 8]}),
    ],
    ids=["float32", "e8m0", "experts"],
)
def test_block_fp8_as_transformers_dequantises(
    tmp_path: Path, architecture: str, pack: packed.Packer, scheme: dict[str, Any], dtype: torch.dtype
) -> None:
    plain = save_tiny(tmp_path / "plain", architecture, dtype=torch.bfloat16)
    folder = packed.pack_folder(plain, tmp_path / "packed", pack, scheme)
    truth = as_transformers_loads(folder, FineGrainedFP8Config(dequantize=True), dtype)
    ours = as_plain(folder, tmp_path / "ours", dtype)
    assert truth.keys() == ours.keys()
    assert all(torch.equal(truth[name], ours[name]) for name in truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt_oss_as_transformers_dequantises(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = save_tiny(tmp_path / "plain", "gpt_oss", dtype=torch.bfloat16)
    folder = packed.pack_gpt_oss(plain, tmp_path / "packed")
    truth = as_transformers_loads(folder, Mxfp4Config(dequantize=True), dtype)
    ours = as_plain(folder, tmp_path / "ours", dtype)
    assert truth.keys() == ours.keys()
    assert all(torch.equal(truth[name], ours[name]) for name in truth)


def test_fp4_experts_of_32_with_e8m0_scales(tmp_path: Path, plain: Path) -> None:
    """As DeepSeek V4: its attention in FP8, both with scales under the name `.scale`; the truth index by index."""

    def pack(weight: torch.Tensor) -> packed.Tensors:
        fp8 = packed.block_fp8(e8m0=True, ending=".scale")
        return packed.fp4_of_32(weight) if weight.shape == (64, 32) else fp8(weight)

    folder = packed.pack_folder(plain, tmp_path / "packed", pack, {**packed.FP8_SCHEME, "expert_dtype": "fp4"})
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = values(folder)
    fp4 = [name for name, tensor in stored.items() if tensor.dtype == torch.int8]
    assert fp4
    for name in fp4:
        codes = stored[name].view(torch.uint8)
        scales = stored[name.replace(".weight", ".scale")].view(torch.uint8)
        for i, j in ((0, 0), (3, 1), (40, 30), (63, 31)):
            code = int(codes[i, j // 2]) >> (4 if j % 2 else 0) & 15
            assert float(ours[name][i, j]) == float(packed.E2M1[code]) * 2.0 ** (int(scales[i, j // 32]) - 127)


def reference(stored: packed.Tensors, module: str, scheme: dict[str, Any]) -> torch.Tensor:
    """What `module` computes with, weight by weight, in the dtype of its scales."""
    weights = scheme["config_groups"]["group_0"]["weights"]
    bits, scales = weights["num_bits"], stored[f"{module}.weight_scale"]
    codes, zeros = stored.get(f"{module}.weight"), stored.get(f"{module}.weight_zero_point")
    if codes is None:
        shape = stored[f"{module}.weight_shape"].tolist()
        codes = unpacked(stored[f"{module}.weight_packed"], bits, shape[1])
        zeros = None if zeros is None else unpacked(zeros.T, bits, shape[0]).T
    out = torch.empty(codes.shape, dtype=scales.dtype)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            at = {
                "tensor": (0,),
                "channel": (i, 0),
                "group": (i, j // weights.get("group_size", 1)),
                "block": (i // 16, j // 16),
            }[weights["strategy"]]
            number = codes[i, j].to(scales.dtype)
            out[i, j] = (number if zeros is None else number - zeros[at].to(scales.dtype)) * scales[at]
    return out


def unpacked(stored: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    rows = []
    for row in stored.tolist():
        number = sum((word & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(row))
        rows.append([(number >> (bits * at) & (2**bits - 1)) - 2 ** (bits - 1) for at in range(columns)])
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(tmp_path: Path, plain: Path, kind: str) -> None:
    pack, scheme = COMPRESSED[kind]
    folder = packed.pack_folder(plain, tmp_path / "packed", pack, scheme)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = values(folder)
    twin = {name: tensor for file in plain.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert ours.keys() == twin.keys()
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        assert torch.equal(ours[f"{module}.weight"], reference(stored, module, scheme))
        error = (ours[f"{module}.weight"] - twin[f"{module}.weight"]).norm() / twin[f"{module}.weight"].norm()
        assert error < 0.2  # the packing itself is sound
    assert torch.equal(ours["lm_head.weight"], twin["lm_head.weight"])


@pytest.mark.parametrize("kind", [*COMPRESSED, "block-fp8", "gpt-oss"])
def test_new_codes(tmp_path: Path, plain: Path, kind: str) -> None:
    """Codes of what stays are bit-identical, 0 is exactly 0, other values go to the nearest code, and stay there."""
    if kind == "gpt-oss":
        twin = save_tiny(tmp_path / "plain", "gpt_oss", dtype=torch.bfloat16)
        folder, name = packed.pack_gpt_oss(twin, tmp_path / "packed"), "model.layers.1.mlp.experts.down_proj"
    else:
        pack, scheme = COMPRESSED.get(kind, (packed.block_fp8(), packed.FP8_SCHEME))
        folder, name = packed.pack_folder(plain, tmp_path / "packed", pack, scheme), "model.layers.1.mlp.up_proj.weight"
    checkpoint = opened(folder)
    weight, old = checkpoint.weights[name], checkpoint.read(name)
    parts = checkpoint.parts(name)
    assert torch.equal(weight.encode(parts, old).view(torch.uint8), parts["codes"].view(torch.uint8))

    keep = torch.rand(old.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    codes = weight.encode(parts, old * keep)
    masked = weight.decode({**parts, "codes": codes})
    assert torch.equal(masked, old * keep)
    counted = weight.zeros({**parts, "codes": codes}, masked.dtype)
    assert (counted is None) == ("zeros" in parts)
    assert counted in (None, int((masked == 0).sum()))
    tiny: Parts = {**parts, "codes": codes, "scales": parts["scales"].float() * 0 + 2.0**-140}
    assert weight.zeros(tiny, masked.dtype) is None
    assert torch.equal(weight.decode({**parts, "codes": weight.encode(parts, old)}), old)

    moved = checkpoint.from_file(name, checkpoint.to_file(name, old * 1.03 * keep))
    assert bool((moved[~keep] == 0).all())
    assert torch.equal(checkpoint.from_file(name, checkpoint.to_file(name, moved)), moved)
    # No value of the same scale is nearer: the old one, for instance, is not.
    wanted = (old * 1.03 * keep).double()
    assert bool(((moved - wanted).abs() <= (old * keep - wanted).abs() * 1.001 + 1e-9).all())


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_nearest_fp4(numbers: list[float]) -> None:
    codes = E2M1()
    found = codes.numbers(codes.nearest(torch.tensor(numbers)))
    for number, value in zip(numbers, found.tolist(), strict=True):
        assert abs(value - number) == min(abs(each - number) for each in packed.E2M1.tolist())


@pytest.mark.parametrize(
    "codes",
    [E4M3(), Int8(), Int8(4), Int32Words(4), Int32Words(8), E2M1()],
    ids=lambda codes: f"{type(codes).__name__}{getattr(codes, 'bits', '')}",
)
def test_every_code_is_the_nearest_to_its_own_number(codes: Any) -> None:
    every: Callable[[int], torch.Tensor] = lambda bits: torch.arange(2**bits).to(torch.uint8)  # noqa: E731
    all_codes = every(codes.bits)
    if isinstance(codes, Int8):
        all_codes = torch.arange(-(2 ** (codes.bits - 1)), 2 ** (codes.bits - 1)).to(torch.int8)
    numbers = codes.numbers(all_codes)
    sound = ~numbers.isnan()
    assert torch.equal(codes.numbers(codes.nearest(numbers[sound])), numbers[sound])


def test_a_plain_checkpoint_stays_what_it_is(plain: Path) -> None:
    assert type(open_checkpoint(plain)).__name__ == "Checkpoint"
