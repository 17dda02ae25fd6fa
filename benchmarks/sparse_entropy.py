"""What standard entropy coders make of pruned weights: bits per weight, and speed beside a copy in memory.

    python benchmarks/sparse_entropy.py examples/demo-model [--dtype bf16 fp16] [--method wanda]

The pruned tensors of one model, at 50 %, 70 % and 2:4. Their masks are coded as they are stored; of their values,
turned left by the sign's bit, the high bytes (bf16: the exponents) apart from the low ones (mantissa and sign). With
`zstandard` installed it is measured too. One thread; seconds are the least of several rounds.
"""

from __future__ import annotations

import argparse
import importlib
import lzma
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import prune_cli
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.sparse.coding import BITMASK, encode, plan

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK = 1 << 18
_TIMED_BYTES = 1 << 22


@dataclass(frozen=True)
class Coder:
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


@dataclass(frozen=True)
class CoupledGroup:
    """The same part of all pruned tensors, in blocks that are coded apart."""

    name: str
    blocks: list[bytes]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.blocks))

    def coded(self, coder: Coder) -> int:
        return sum(len(coder.compress(block)) for block in self.blocks)


def coders() -> Iterator[tuple[str, Coder]]:
    yield "zlib, Huffman only", Coder(_huffman, zlib.decompress)
    yield "zlib 6", Coder(partial(zlib.compress, level=6), zlib.decompress)
    yield "lzma 1", Coder(partial(lzma.compress, preset=1), lzma.decompress)
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        return
    decompress = zstandard.ZstdDecompressor().decompress
    for level in (1, 9):
        yield f"zstd {level}", Coder(zstandard.ZstdCompressor(level=level).compress, decompress)
    few = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, window_log=18, hash_log=6, chain_log=6, search_log=1, min_match=7
    )
    yield "zstd, hardly any matches", Coder(zstandard.ZstdCompressor(compression_params=few).compress, decompress)


def _huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def cast(model: Path, dtype: torch.dtype, out: Path) -> Path:
    """A copy of a checkpoint with its floats in `dtype`."""
    shutil.copytree(model, out, copy_function=shutil.copyfile)
    out.chmod(0o755)
    for path in out.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        path.chmod(0o644)
        save_file(tensors, path, metadata={"format": "pt"})
    return out


def parts(folder: Path, names: list[str]) -> tuple[int, list[CoupledGroup]]:
    """How many weights the tensors have, and their masks, high bytes and low bytes."""
    checkpoint, weights = Checkpoint.open(folder), 0
    pieces: dict[str, list[np.ndarray]] = {"mask": [], "high": [], "low": []}
    for name in names:
        tensor = checkpoint.read(name)
        bits = tensor.reshape(-1).view(torch.uint16).numpy()
        weights += len(bits)
        encoding = plan(bits, tensor.shape[-1]).encoding
        for values, mask in encode(bits, encoding if ":" in encoding else BITMASK):
            turned = (values << 1) | (values >> 15)
            pieces["mask"].append(mask)
            pieces["high"].append((turned >> 8).astype(np.uint8))
            pieces["low"].append(turned.astype(np.uint8))
    return weights, [CoupledGroup(name, _blocks(np.concatenate(of).tobytes())) for name, of in pieces.items()]


def _blocks(data: bytes) -> list[bytes]:
    return [data[begin : begin + _BLOCK] for begin in range(0, len(data), _BLOCK)]


def entropy(part: CoupledGroup) -> float:
    """Bytes that independent bytes need at least."""
    counts = np.bincount(np.frombuffer(b"".join(part.blocks), np.uint8), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) * part.nbytes / 8


def seconds(work: Callable[[bytes], object], blocks: list[bytes], rounds: int = 3) -> float:
    best = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        for block in blocks:
            work(block)
        best = min(best, time.perf_counter() - begun)
    return best


def speeds(coder: Coder, part: CoupledGroup) -> tuple[float, float]:
    """GB/s in and out, of the bytes that are not coded."""
    blocks = (part.blocks * (_TIMED_BYTES // part.nbytes + 1))[: _TIMED_BYTES // _BLOCK]
    coded = [coder.compress(block) for block in blocks]
    assert [coder.decompress(block) for block in coded] == blocks
    size = sum(map(len, blocks)) / 1e9
    return size / seconds(coder.compress, blocks), size / seconds(coder.decompress, coded)


def rows(begin: str, weights: int, every: list[CoupledGroup]) -> Iterator[str]:
    def bits(sizes: list[float]) -> str:
        # What a coder makes larger is stored as it is.
        least = [min(size, part.nbytes) for size, part in zip(sizes, every, strict=True)]
        return " | ".join(f"{8 * size / weights:.2f}" for size in [*least, sum(least)])

    yield f"{begin} stored | {bits([part.nbytes for part in every])} | | |"
    yield f"{begin} entropy of the bytes | {bits([entropy(part) for part in every])} | | |"
    for name, coder in coders():
        into, out = speeds(coder, every[1])
        yield f"{begin} {name} | {bits([part.coded(coder) for part in every])} | {into:.2f} | {out:.2f} |"


def copy_speed() -> float:
    source = np.ones(1 << 26, np.uint8)
    target = source.copy()
    return source.nbytes / 1e9 / seconds(lambda _: np.copyto(target, source), [b""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bf16"])
    parser.add_argument("--method", default="wanda")
    options = parser.parse_args()
    print(f"A copy in memory: {copy_speed():.1f} GB/s\n")
    print("| weights | zeros | coder | mask | high | low | bits a weight | high bytes: GB/s in | out |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in options.dtype:
        with TemporaryDirectory() as name:
            model = cast(options.model, _DTYPES[dtype], Path(name) / "model")
            for zeros, asked in {
                "50 %": {"sparsity": 0.5},
                "70 %": {"sparsity": 0.7},
                "2:4": {"pattern": "2:4"},
            }.items():
                out = Path(name) / zeros.replace(" %", "").replace(":", "of")
                report = prune_cli.prune(model, out, method=options.method, **asked)
                pruned = [tensor.name for tensor in report.tensors if tensor.action == "pruned"]
                for row in rows(f"| {dtype} | {zeros} |", *parts(out, pruned)):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
