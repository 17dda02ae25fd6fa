"""Packs tiny plain checkpoints as the published ones are packed, and says what the values are; shares no code with
the package. Weights are (out, in), loops are Python loops.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
Tensors = dict[str, torch.Tensor]
# From a name without `.weight` and the weight to what is stored for it, by the endings of the names.
Packer = Callable[[torch.Tensor], Tensors]


def blocks(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The largest absolute value of every tile, (tiles down, tiles across)."""
    return torch.stack(
        [torch.stack([tile.abs().amax() for tile in band.split(columns, 1)]) for band in weight.split(rows, 0)]
    )


def of_tiles(grid: torch.Tensor, weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(out, in): what `grid` has for every weight, index by index."""
    down = torch.arange(weight.shape[0]) // rows
    across = torch.arange(weight.shape[1]) // columns
    return grid[down][:, across]


def nearest_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)


def power_of_two(scales: torch.Tensor) -> torch.Tensor:
    """The bytes of the powers of two above `scales`."""
    return (torch.ceil(torch.log2(scales.clamp(min=2.0**-100))) + 127).to(torch.uint8)


def two_in_a_byte(codes: torch.Tensor) -> torch.Tensor:
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def block_fp8(block: int = 16, *, e8m0: bool = False, ending: str = ".weight_scale_inv") -> Packer:
    def pack(weight: torch.Tensor) -> Tensors:
        scales = blocks(weight.float(), block, block) / 448
        stored = power_of_two(scales).view(torch.float8_e8m0fnu) if e8m0 else scales
        codes = (weight.float() / of_tiles(stored.float(), weight, block, block)).to(torch.float8_e4m3fn)
        return {".weight": codes, ending: stored}

    return pack


def fp4_of_32(weight: torch.Tensor) -> Tensors:
    """As the experts of DeepSeek V4."""
    stored = power_of_two(blocks(weight.float(), 1, 32) / 6)
    scales = of_tiles(torch.exp2(stored.float() - 127), weight, 1, 32)
    codes = two_in_a_byte(nearest_e2m1(weight.float() / scales))
    return {".weight": codes.view(torch.int8), ".scale": stored.view(torch.float8_e8m0fnu)}


def whole_numbers(weight: torch.Tensor, bits: int, columns: int, *, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Signed codes, bf16 scales and zero points of groups of `columns`."""
    half = 2 ** (bits - 1)
    groups = weight.float().unflatten(1, (-1, columns))
    if symmetric:
        scales = (groups.abs().amax(-1) / (half - 0.5)).bfloat16()
        zeros = torch.zeros_like(scales)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / (2 * half - 1)).bfloat16()
        zeros = (-half - low / scales.float()).round().clamp(-half, half - 1)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(-half, half - 1)
    return codes.flatten(1).to(torch.int8), scales, zeros.to(torch.int8)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of signed codes as int32, one number after the other from the lowest bit on."""
    rows = []
    for row in codes.tolist():
        number = sum((code + 2 ** (bits - 1)) << (bits * at) for at, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append(
            [
                int.from_bytes((number >> (32 * at) & 0xFFFFFFFF).to_bytes(4, "little"), "little", signed=False)
                for at in range(count)
            ]
        )
    return torch.tensor(rows, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def pack_quantized(bits: int = 4, group: int | None = 16, *, symmetric: bool = True) -> Packer:
    def pack(weight: torch.Tensor) -> Tensors:
        codes, scales, zeros = whole_numbers(weight, bits, group or weight.shape[1], symmetric=symmetric)
        packed = {
            ".weight_packed": words(codes, bits),
            ".weight_scale": scales,
            ".weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            packed[".weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        return packed

    return pack


def int_quantized(group: int | None = None, *, symmetric: bool = True) -> Packer:
    def pack(weight: torch.Tensor) -> Tensors:
        codes, scales, zeros = whole_numbers(weight, 8, group or weight.shape[1], symmetric=symmetric)
        return {".weight": codes, ".weight_scale": scales, **({} if symmetric else {".weight_zero_point": zeros})}

    return pack


def float_quantized(strategy: str, size: int = 16) -> Packer:
    def pack(weight: torch.Tensor) -> Tensors:
        rows, columns = {
            "tensor": tuple(weight.shape),
            "channel": (1, weight.shape[1]),
            "group": (1, size),
            "block": (size, size),
        }[strategy]
        scales = (blocks(weight.float(), rows, columns) / 448).bfloat16()
        codes = (weight.float() / of_tiles(scales.float(), weight, rows, columns)).clamp(-448, 448)
        stored = scales.flatten() if strategy == "tensor" else scales
        return {".weight": codes.to(torch.float8_e4m3fn), ".weight_scale": stored}

    return pack


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors for all linear layers but the head."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}}
    if form in ("float-quantized", "int-quantized"):
        kind = weights["type"]
        group["input_activations"] = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Linear layers of blocks, by the names of Llama and its like."""
    return tensor.ndim == 2 and "_proj.weight" in name


def pack_folder(
    plain: Path, folder: Path, pack: Packer, scheme: Mapping[str, Any], which: Callable[..., bool] = is_linear
) -> Path:
    """`plain` with every tensor that `which` chooses packed, in as many files; `scheme` is the quantization_config."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for file in sorted(plain.iterdir()):
        if file.suffix != ".safetensors":
            if file.name not in ("config.json", "model.safetensors.index.json"):
                (folder / file.name).write_bytes(file.read_bytes())
            continue
        stored: Tensors = {}
        for name, tensor in load_file(file).items():
            parts = pack(tensor) if which(name, tensor) else None
            stored |= (
                {name: tensor} if parts is None else {name.removesuffix(".weight") + end: t for end, t in parts.items()}
            )
        save_file(stored, folder / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, file.name)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(scheme)}))
    return folder


def pack_gpt_oss(plain: Path, folder: Path) -> Path:
    """The experts of a plain gpt-oss as `_blocks` and `_scales`."""

    def pack(weight: torch.Tensor) -> Tensors:
        rows = weight.float().transpose(1, 2)
        groups = rows.unflatten(-1, (-1, 32))
        scales = power_of_two(groups.abs().amax(-1) / 6)
        codes = nearest_e2m1(groups / torch.exp2(scales.float() - 127)[..., None])
        return {"_blocks": two_in_a_byte(codes), "_scales": scales}

    scheme = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return pack_folder(plain, folder, pack, scheme, lambda name, tensor: tensor.ndim == 3)


FP8_SCHEME = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"]}


def change(folder: Path, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Give tensors another value in whatever file they are; None takes away."""
    weight_map: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored = load_file(file)
        if stored.keys() & tensors.keys():
            changed = {name: tensors.get(name, tensor) for name, tensor in stored.items()}
            stored = {name: tensor for name, tensor in changed.items() if tensor is not None}
            save_file(stored, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, file.name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
