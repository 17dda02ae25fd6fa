"""Reads sparse safetensors (docs/sparse-safetensors.md) with numpy and zlib: python read_sparse.py FOLDER

Written for clarity, as a second opinion on the format: no prune_cli, no torch, no safetensors.
"""

from __future__ import annotations

import json
import sys
import zlib
from itertools import combinations
from math import comb, prod
from pathlib import Path
from typing import Any

import numpy as np

BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}


def read_file(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Each tensor of a sparse shard: name -> (safetensors dtype, shape, decoded bytes)."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    about = json.loads(header.pop("__metadata__")["prune_cli_sparse"])
    if about["version"] not in (1, 2):
        raise ValueError(f"{path} has version {about['version']}, this reader knows 1 and 2")

    def stored(name: str) -> bytes:
        begin, end = header[name]["data_offsets"]
        return content[8 + length + begin : 8 + length + end]

    tensors = {}
    for name, told in about["tensors"].items():
        data, encoding = stored(name), told["encoding"].removesuffix("+deflate")
        if encoding != told["encoding"]:
            data = joined_values(stored(name + ".sparse_high"), data, BYTES[told["dtype"]])
        if encoding != "dense":
            count = prod(told["shape"])
            kept = kept_elements(stored(name + ".sparse_mask"), encoding, count)
            values = np.frombuffer(data, f"V{BYTES.get(told['dtype'], 1)}")
            if len(values) != np.count_nonzero(kept):
                raise ValueError(f"{name} has {len(values)} values, but its mask keeps {np.count_nonzero(kept)}")
            elements = np.zeros(count, values.dtype)
            elements[kept] = values
            data = elements.tobytes()
        if zlib.crc32(data) != int(told["crc32"], 16):
            raise ValueError(f"{name} has a wrong checksum")
        tensors[name] = (told["dtype"], told["shape"], data)
    return tensors


def joined_values(high: bytes, low: bytes, size: int) -> bytes:
    """Values of `size` bytes from their deflated high bytes and the others, which end in the sign's bit."""
    count = len(low) // (size - 1)
    inflate = zlib.decompressobj(-15)
    first = inflate.decompress(high, count + 1)
    if len(first) != count or not inflate.eof:
        raise ValueError("the high bytes are not as many as the values")
    every = np.empty((count, size), np.uint8)
    every[:, -1] = np.frombuffer(first, np.uint8)
    every[:, :-1] = np.frombuffer(low, np.uint8).reshape(count, size - 1)
    turned = every.reshape(-1).view(f"<u{size}")
    return (turned >> 1 | turned << (8 * size - 1)).tobytes()


def kept_elements(mask: bytes, encoding: str, count: int) -> np.ndarray:
    """(count,) booleans."""
    if encoding == "bitmask":
        return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:count].astype(bool)
    keep, of = map(int, encoding.split(":"))
    states = comb(of, keep)
    fits = {size: max(k for k in range(8 * size + 1) if states**k <= 256**size) for size in (1, 2, 4)}
    size = min((size for size in fits if fits[size]), key=lambda size: (size / fits[size], size))
    numbers = sorted(sum(1 << place for place in places) for places in combinations(range(of), keep))
    groups = []
    for begin in range(0, len(mask), size):
        word = int.from_bytes(mask[begin : begin + size], "little")
        for _ in range(fits[size]):
            word, rank = divmod(word, states)
            groups.append([numbers[rank] >> place & 1 for place in range(of)])
    return np.array(groups[: count // of], bool).reshape(-1)


def main() -> None:
    for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        for name, (dtype, shape, data) in read_file(path).items():
            print(f"{name}  {dtype}  {'x'.join(map(str, shape))}  {len(data)} bytes")


if __name__ == "__main__":
    main()
