"""The dtypes of safetensors, by their names there. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# The bits of a float's exponent, which are all ones for NaN and Inf.
EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
FLOATS = frozenset(EXPONENTS)
# Those that models compute in; F64 is stored now and then, and computed with in F32.
SHORT_FLOATS = FLOATS - {"F64"}
_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip


def data_bytes(dtype: str, count: int) -> int:
    """How many bytes `count` numbers take."""
    return (count * BITS[dtype] + 7) // 8


def torch_dtype(dtype: str) -> torch.dtype:
    """What torch calls it; KeyError for the ones under a byte, which it has not."""
    import torch

    return getattr(torch, _TORCH[dtype])
