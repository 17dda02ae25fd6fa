"""`quant_method: compressed-tensors`: what llm-compressor writes, a group of `config_groups` for each kind of layer.

`pack-quantized`: `weight_packed` (int32 words), `weight_scale`, `weight_shape`, and `weight_zero_point` packed along
the outputs. `float-quantized`, `int-quantized` and `naive-quantized`: `weight` of 8-bit codes with `weight_scale` and
perhaps `weight_zero_point`. `mxfp4-pack-quantized`: `weight_packed` of E2M1 pairs, `weight_scale` of E8M0. Numbers and
scales are multiplied in the dtype of the scales, except for FP8 experts, which transformers multiplies in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prune_cli.checkpoint.dtypes import SHORT_FLOATS
from prune_cli.checkpoint.reader import Checkpoint, TensorEntry
from prune_cli.errors import RequestError
from prune_cli.packed.codes import E2M1, E4M3, Codes, Int8, Int32Words
from prune_cli.packed.headers import Entries, check_dtype, check_shape, part
from prune_cli.packed.scales import grid_shape
from prune_cli.packed.weight import CoupledGroup, PackedWeight

_PACKED, _PLAIN = "pack-quantized", ("float-quantized", "int-quantized", "naive-quantized")
_MXFP4, _MIXED = "mxfp4-pack-quantized", "mixed-precision"
FORMATS = (_PACKED, *_PLAIN, _MXFP4, _MIXED)
_WORD_BITS = (2, 4, 8)
_CODES = (".weight_packed", ".weight")
_PARTS = (".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale")
_BESIDE = re.compile(r"\.(input|output|q|k|v|key|value|query)_(scale|zero_point|global_scale)$")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Scheme:
    """What a config group says of the weights of its layers."""

    group: str
    format: str
    bits: int
    kind: str
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale, of a weight of `shape` (out, in)."""
        rows, columns = shape
        if self.strategy == "group" and self.group_size:
            return 1, self.group_size
        if self.strategy == "block" and self.block:
            return self.block
        return (1, columns) if self.strategy == "channel" else (rows, columns)


def find_compressed(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[PackedWeight]:
    """`config` is the quantization_config; raises RequestError, naming the tensor, for what disagrees with it."""
    entries, schemes = checkpoint.entries, _schemes(config)
    beside = [name for name in entries if _BESIDE.search(name)]
    weights: list[PackedWeight] = []
    for name in entries:
        module, ending, _ = name.rpartition(".weight_scale")
        if ending and name.endswith(".weight_scale"):
            _check_not_ignored(module, config)
            own = tuple(each for each in beside if each.startswith(module + "."))
            weights.append(_weight(module, checkpoint, _scheme_of(module, schemes), own))
    _check_nothing_left(entries, weights)
    return weights


def is_read(config: Mapping[str, Any]) -> bool:
    """Whether `config`, a quantization_config, speaks of packed weights in formats that are read here."""
    return "config_groups" in config and unread_format(config) is None


def unread_format(config: Mapping[str, Any]) -> str | None:
    """A format that `config` names and that is not read here."""
    sparsity = config.get("sparsity_config") or {}
    sparse = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if sparse not in (None, "dense"):
        return str(sparse)
    groups = _groups(config).values() if "config_groups" in config else ()
    formats = [config.get("format"), *(group.get("format") for group in groups)]
    return next((str(each) for each in formats if each is not None and each not in FORMATS), None)


def _groups(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise RequestError(
            "config.json has a quantization_config of compressed-tensors without usable config_groups: "
            "download it again."
        )
    return dict(groups)


def _schemes(config: Mapping[str, Any]) -> list[tuple[list[str], Scheme]]:
    """Targets and scheme of every group with weights."""
    found = []
    for name, group in _groups(config).items():
        weights, targets = group.get("weights"), group.get("targets") or []
        if weights:
            found.append(([str(target) for target in targets], _scheme(name, group, weights, config)))
    return found


def _scheme(name: str, group: Mapping[str, Any], weights: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
    block = weights.get("block_structure")
    if isinstance(block, str):
        block = [int(side) for side in block.split("x")]
    if strategy not in ("tensor", "channel", "group", "block"):
        raise RequestError(f"config.json has the strategy {strategy!r} for the weights of {name}, which is not read.")
    return Scheme(
        group=name,
        format=group.get("format") or config.get("format") or _MIXED,
        bits=weights.get("num_bits", 8),
        kind=weights.get("type", "int"),
        strategy=strategy,
        group_size=size,
        block=(block[0], block[1]) if block else None,
        symmetric=weights.get("symmetric", True),
    )


def _scheme_of(module: str, schemes: list[tuple[list[str], Scheme]]) -> Scheme:
    """The group that names the module, by its name, a regular expression, or (the others) its class."""
    tests = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and re.match(target.removeprefix("re:"), module),
        lambda target: not target.startswith("re:") and "." not in target,
    )
    for test in tests:
        for targets, scheme in schemes:
            if any(test(target) for target in targets):
                return scheme
    raise RequestError(
        f"{module}.weight_scale is stored, but no group of config.json's quantization_config targets {module}: "
        "the weights and the config do not belong together."
    )


def _check_not_ignored(module: str, config: Mapping[str, Any]) -> None:
    for entry in config.get("ignore") or ():
        if entry == module or (entry.startswith("re:") and re.match(entry.removeprefix("re:"), module)):
            raise RequestError(
                f"{module}.weight_scale is stored, but config.json lists {entry!r} among the modules that are not "
                "quantised: the weights and the config do not belong together."
            )


def _weight(module: str, checkpoint: Checkpoint, scheme: Scheme, beside: tuple[str, ...]) -> PackedWeight:
    entries = checkpoint.entries
    found = next((module + ending for ending in _CODES if module + ending in entries), None)
    if found is None:
        raise RequestError(f"{module}.weight_scale has no weight_packed or weight beside it: a shard was lost.")
    for ending in (".weight_g_idx", ".weight_global_scale"):
        if module + ending in entries:
            raise RequestError(f"{module}{ending}: groups in the order of activations and global scales are not read.")
    codes = _codes(entries[found], scheme)
    shape, recorded = _shape(module, entries[found], checkpoint, codes)
    if len(shape) != 2:
        raise RequestError(f"{found} has {len(shape)} dimensions: only matrices (out, in) are read.")
    scales = entries[f"{module}.weight_scale"]
    check_dtype(scales, {"U8", "F8_E8M0"} if isinstance(codes, E2M1) else SHORT_FLOATS, f"format {scheme.format}")
    tile = scheme.tile(shape)
    if scheme.strategy == "group" and shape[1] % tile[1]:
        raise RequestError(f"{found} has {shape[1]} inputs, no multiple of group_size {tile[1]} in config.json.")
    grid = grid_shape(shape, tile)
    same = [(grid[0],)] if grid[1] == 1 else []
    why = f"strategy {scheme.strategy} for {list(shape)}"
    check_shape(scales, grid, *same, *([()] if grid == (1, 1) else []), why=why)
    parts: dict[CoupledGroup, str] = {"codes": found, "scales": scales.name}
    if not scheme.symmetric:
        parts["zeros"] = _zeros(module, entries, codes, grid).name
    arithmetic = _arithmetic(module, scales, codes)
    return PackedWeight(
        name=f"{module}.weight",
        shape=shape,
        dtype=arithmetic,
        label=_label(codes, scheme),
        codes=codes,
        tile=tile,
        parts=parts,
        beside=(*recorded, *_unused_zeros(module, entries, parts), *beside),
        arithmetic=arithmetic,
    )


def _codes(entry: TensorEntry, scheme: Scheme) -> Codes:
    """How the codes in `entry` lie there. Raises RequestError where that is not what the config says."""
    said = f"format {scheme.format} of {scheme.bits}-bit {scheme.kind}"
    codes: Codes
    if scheme.format == _MXFP4 or (scheme.kind, scheme.bits) == ("float", 4):
        codes = E2M1()
    elif scheme.kind == "float":
        codes = E4M3()
    elif entry.name.endswith("_packed"):
        codes = Int32Words(scheme.bits)
    else:
        codes = Int8(scheme.bits)
    packed = entry.name.endswith("_packed")
    wants_packed = scheme.format in (_PACKED, _MXFP4) or (scheme.format == _MIXED and packed)
    known = scheme.bits in (_WORD_BITS if isinstance(codes, Int32Words) else range(2, 9))
    if wants_packed != packed or not known or (isinstance(codes, E4M3) and scheme.bits != 8):
        raise RequestError(f"{entry.name} is not what config.json says of its group ({said}), or that is not read.")
    check_dtype(entry, codes.dtypes, said)
    return codes


def _shape(
    module: str, entry: TensorEntry, checkpoint: Checkpoint, codes: Codes
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The weight's shape, and the tensor that records it where there is one."""
    name = f"{module}.weight_shape"
    if not isinstance(codes, Int32Words):
        doubled = 2 if isinstance(codes, E2M1) else 1
        recorded = (name,) if name in checkpoint.entries else ()
        return (*entry.shape[:-1], doubled * entry.shape[-1]), recorded
    recorded_shape = part(checkpoint.entries, name, entry.name)
    check_dtype(recorded_shape, {"I64", "I32"}, _PACKED)
    check_shape(recorded_shape, (2,), why="it holds (out, in)")
    rows, columns = (int(side) for side in checkpoint.read(name))
    if entry.shape != (rows, codes.stored_columns(columns)):
        raise RequestError(
            f"{name} says [{rows}, {columns}], but {entry.name} with {codes.bits} bits has the shape "
            f"{list(entry.shape)}: the weights and the config do not belong together."
        )
    return (rows, columns), (name,)


def _zeros(module: str, entries: Entries, codes: Codes, grid: tuple[int, ...]) -> TensorEntry:
    entry = part(entries, f"{module}.weight_zero_point", f"{module} (not symmetric)")
    check_dtype(entry, codes.dtypes, "a zero point")
    if isinstance(codes, Int32Words):
        check_shape(entry, (codes.stored_columns(grid[0]), grid[1]), why="packed along the outputs")
    else:
        check_shape(entry, grid, *([(grid[0],)] if grid[1] == 1 else []), why="one for every scale")
    return entry


def _unused_zeros(module: str, entries: Entries, parts: Mapping[CoupledGroup, str]) -> tuple[str, ...]:
    """Symmetric weights may have zero points of zero beside them, which nobody reads."""
    name = f"{module}.weight_zero_point"
    return (name,) if name in entries and "zeros" not in parts else ()


def _arithmetic(module: str, scales: TensorEntry, codes: Codes) -> str:
    if isinstance(codes, E4M3) and _EXPERT.search(module):
        return "F32"
    return scales.dtype if scales.dtype in SHORT_FLOATS else "BF16"


def _label(codes: Codes, scheme: Scheme) -> str:
    if isinstance(codes, E2M1):
        return "MXFP4"
    kind = "FP8" if isinstance(codes, E4M3) else f"INT{scheme.bits}"
    size = f" {scheme.group_size}" if scheme.strategy == "group" else ""
    return f"{kind} {scheme.strategy}{size}"


def _check_nothing_left(entries: Entries, weights: list[PackedWeight]) -> None:
    """Every tensor that only a packed weight has belongs to one."""
    taken = {name for weight in weights for name in (*weight.parts.values(), *weight.beside)}
    for name, entry in entries.items():
        lone = name.endswith((".weight_packed", *_PARTS)) or (name.endswith(".weight") and entry.dtype in E4M3.dtypes)
        if lone and name not in taken:
            part(entries, f"{name.rpartition('.')[0]}.weight_scale", name)
            raise RequestError(f"{name} belongs to no packed weight: a shard was lost, or download it again.")
