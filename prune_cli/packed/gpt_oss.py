"""`quant_method: mxfp4`: the experts of gpt-oss, (experts, out, groups, 16) bytes of two E2M1 codes with E8M0 scales.

The plain parameter is (experts, in, out); gate and up are interleaved in both, so a row is a row. Checkpoints say with
`modules_to_not_convert` what is plain; the experts' biases are plain too.
"""

from __future__ import annotations

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.errors import RequestError
from prune_cli.packed.codes import E2M1
from prune_cli.packed.headers import Entries, check_dtype, check_shape, part
from prune_cli.packed.weight import PackedWeight

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP, _BYTES = 32, 16
_SCHEME = "quant_method mxfp4"


def find_mxfp4(entries: Entries) -> list[PackedWeight]:
    """Raises RequestError, naming the tensor, for blocks or scales alone and shapes that differ."""
    for name in entries:
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS not in entries:
            raise RequestError(f"{name} has no {_BLOCKS} beside it: a shard was lost.")
    return [_weight(entry, entries) for entry in entries.values() if entry.name.endswith(_BLOCKS)]


def _weight(entry: TensorEntry, entries: Entries) -> PackedWeight:
    name = entry.name.removesuffix(_BLOCKS)
    scales = part(entries, name + _SCALES, entry.name)
    check_dtype(entry, {"U8"}, _SCHEME)
    check_dtype(scales, {"U8", "F8_E8M0"}, _SCHEME)
    if len(entry.shape) != 4 or entry.shape[-1] != _BYTES:
        raise RequestError(
            f"{entry.name} has the shape {list(entry.shape)}, expected [experts, out, groups, {_BYTES}]: "
            "the weights and the config do not belong together."
        )
    experts, rows, groups, _ = entry.shape
    check_shape(scales, (experts, rows, groups), why="a scale for every group of its blocks")
    if name in entries:
        raise RequestError(f"{name} is stored twice, plain and as {entry.name}: keep one of them.")
    return PackedWeight(
        name=name,
        shape=(experts, groups * _GROUP, rows),
        dtype="BF16",
        label="MXFP4",
        codes=E2M1(),
        tile=(1, _GROUP),
        parts={"codes": entry.name, "scales": scales.name},
        transposed=True,
    )
