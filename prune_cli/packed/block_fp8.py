"""`quant_method: fp8`: FP8 codes with a scale for every block, as DeepSeek V3 to V4, MiniMax and Qwen's -FP8 have them.

`X.weight` (F8_E4M3) goes with `X.weight_scale_inv` (`X.scale` in DeepSeek V4, `X.qscale_weight` in Mistral Large 4),
in spite of its name what numbers are multiplied by. Experts may be FP4 (`expert_dtype: fp4`): two E2M1 codes to a byte
and an E8M0 scale for every 32. Which scales are stored is told by their dtype: DeepSeek V3.1 says `ue8m0` and has
float32 ones that are powers of two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prune_cli.checkpoint.dtypes import SHORT_FLOATS
from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.errors import RequestError
from prune_cli.packed.codes import E2M1, E4M3
from prune_cli.packed.headers import Entries, check_dtype, check_shape, part
from prune_cli.packed.scales import E8M0, grid_shape
from prune_cli.packed.weight import PackedWeight

_SCALES = ("_scale_inv", ".scale", ".qscale_weight")
_BESIDE = (".activation_scale", ".input_scale", ".qscale_act", "_activation_scale")
_FP4_TILE = (1, 32)
_EXPERT = re.compile(r"\.experts\.(\d+\.)?")


def find_block_fp8(entries: Entries, scheme: Mapping[str, Any], expert_dtype: str | None) -> list[PackedWeight]:
    """`scheme` is the quantization_config; raises RequestError, naming the tensor, for what disagrees with it."""
    weights: list[PackedWeight] = []
    for entry in entries.values():
        scales = scale_name(entry.name, entries)
        if entry.dtype == "F8_E4M3":
            weights.append(_fp8(entry, entries, scales, scheme, expert_dtype))
        elif entry.dtype in E2M1.dtypes and scales is not None:
            weights.append(_fp4(entry, entries[scales], expert_dtype))
        elif scales is not None:
            check_dtype(entry, E4M3.dtypes | E2M1.dtypes, "quant_method fp8")
    taken = {name for weight in weights for name in weight.parts.values()}
    for name in entries:
        if name.endswith("_scale_inv") and name not in taken:
            raise RequestError(f"{name} is a scale, but the weight that it belongs to is missing: a shard was lost.")
    return weights


def scale_name(name: str, entries: Entries) -> str | None:
    """The scales stored for the tensor `name`, if there are any."""
    owner = name.removesuffix(".weight")
    candidates = [name + _SCALES[0], *(owner + ending for ending in _SCALES[1:] if owner != name)]
    return next((each for each in candidates if each in entries), None)


def _fp8(
    entry: TensorEntry, entries: Entries, scales: str | None, scheme: Mapping[str, Any], expert_dtype: str | None
) -> PackedWeight:
    _check_converted(entry.name, scheme)
    if expert_dtype == "fp4" and _EXPERT.search(entry.name):
        raise RequestError(f"{entry.name} is FP8, but config.json says expert_dtype fp4: they do not belong together.")
    if len(entry.shape) not in (2, 3):
        raise RequestError(f"{entry.name} is FP8 with {len(entry.shape)} dimensions: only matrices are read.")
    found = entries[scales] if scales is not None else part(entries, f"{entry.name}_scale_inv", entry.name)
    check_dtype(found, SHORT_FLOATS | E8M0, "quant_method fp8")
    block = scheme.get("weight_block_size", (128, 128))
    if block is None:
        tile, shapes = entry.shape[-2:], [(), (1,), (1, 1)]
    else:
        tile = _block(block)
        shapes = [grid_shape(entry.shape, tile)]
    check_shape(found, *shapes, why=f"weight_block_size {block} and {list(entry.shape)} of its weight")
    return PackedWeight(
        name=entry.name,
        shape=entry.shape,
        dtype="BF16" if found.dtype in E8M0 else "F32",
        label="block FP8" if block is not None else "FP8",
        codes=E4M3(),
        tile=(tile[0], tile[1]),
        parts={"codes": entry.name, "scales": found.name},
        beside=_beside(entry.name, entries),
    )


def _fp4(entry: TensorEntry, scales: TensorEntry, expert_dtype: str | None) -> PackedWeight:
    if expert_dtype not in (None, "fp4"):
        raise RequestError(
            f"{entry.name} is {entry.dtype}, which would be FP4, but config.json says expert_dtype {expert_dtype}: "
            "they do not belong together."
        )
    check_dtype(scales, E8M0, "expert_dtype fp4")
    doubled = 1 if entry.dtype == "F4" else 2
    shape = (*entry.shape[:-1], doubled * entry.shape[-1])
    check_shape(scales, grid_shape(shape, _FP4_TILE), why=f"a scale for every 32 of {list(shape)}")
    return PackedWeight(
        name=entry.name,
        shape=shape,
        dtype="BF16",
        label="MXFP4",
        codes=E2M1(),
        tile=_FP4_TILE,
        parts={"codes": entry.name, "scales": scales.name},
    )


def _block(given: Any) -> tuple[int, int]:
    if isinstance(given, Sequence) and len(given) == 2 and all(type(side) is int and side > 0 for side in given):
        return given[0], given[1]
    raise RequestError(f"config.json has weight_block_size = {given!r}, expected two counts: download it again.")


def _beside(name: str, entries: Entries) -> tuple[str, ...]:
    owner = name.removesuffix(".weight")
    return tuple(owner + ending for ending in _BESIDE if owner + ending in entries)


def _check_converted(name: str, scheme: Mapping[str, Any]) -> None:
    """Refuse FP8 where the config says that a module was left as it was, as transformers reads such a list."""
    module = name.rpartition(".")[0]
    for pattern in scheme.get("modules_to_not_convert") or scheme.get("ignored_layers") or ():
        if module.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module):
            raise RequestError(
                f"{name} is FP8, but config.json lists {pattern!r} among the modules that are not converted: "
                "the weights and the config do not belong together."
            )
