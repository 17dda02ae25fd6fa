"""What becomes of zeros in the formats and kernels that other runtimes use; docs/runtimes.md has the results.

    python benchmarks/runtimes.py gguf              # needs gguf: which types keep zeros, of those it writes in numpy
    python benchmarks/runtimes.py ggml LIBRARY      # needs gguf and a libggml-base.so: all that llama.cpp writes
    python benchmarks/runtimes.py int4              # needs compressed-tensors: INT4 in groups of 128
    python benchmarks/runtimes.py nm                # needs llmcompressor: what its N:M counts
    python benchmarks/runtimes.py csr --rows 4096   # torch's CSR product with a vector, int64 and int32 indices

Needs torch and numpy beside, and nothing of prune-cli. Times are ratios to the dense product, of medians over rounds
that alternate.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

_ROWS, _COLUMNS, _GROUP = 256, 4096, 128
# What activations are quantised to while they are multiplied; no weights are stored so.
_FOR_PRODUCTS = ("Q8_1", "Q8_K")


def pruned_weights(sparsity: float) -> np.ndarray:
    """Gaussian weights (_ROWS, _COLUMNS) in float32, the smallest of each row zero."""
    weights = np.random.default_rng(0).normal(0, 0.02, (_ROWS, _COLUMNS)).astype(np.float32)
    gone = np.argsort(np.abs(weights), axis=1)[:, : int(sparsity * _COLUMNS)]
    np.put_along_axis(weights, gone, 0, axis=1)
    return weights


def kept_zeros(before: np.ndarray, after: np.ndarray) -> float:
    """The share of the zeros of `before` that are zeros of `after`."""
    return float((after[before == 0] == 0).mean())


def gguf_types() -> None:
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise SystemExit("This needs the package gguf: pip install gguf") from None
    weights = pruned_weights(0.5)
    print("| GGUF type | zeros kept |\n| --- | --- |")
    for kind in gguf.GGMLQuantizationType:
        try:
            stored = gguf.quants.quantize(weights, kind)
            again = gguf.quants.dequantize(stored, kind)
        except NotImplementedError:
            continue
        print(f"| {kind.name} | {kept_zeros(weights, again):.1%} |")


def ggml_types(library: str) -> None:
    """As ggml quantises, with all inputs alike where a type wants to know their weights, and gguf decodes again."""
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise SystemExit("This needs the package gguf: pip install gguf") from None
    ggml = ctypes.CDLL(library)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    weights = pruned_weights(0.5)
    print("| GGUF type | inputs a block | zeros kept | relative error |\n| --- | --- | --- | --- |")
    for kind, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        if not kind.name.startswith(("Q", "IQ", "MXFP", "NVFP", "TQ")) or kind.name in _FOR_PRODUCTS:
            continue
        stored = np.zeros((_ROWS, _COLUMNS // block * nbytes), np.uint8)
        wanted = np.ones(_COLUMNS, np.float32) if ggml.ggml_quantize_requires_imatrix(kind.value) else None
        ggml.ggml_quantize_chunk(
            ctypes.c_int(kind.value),
            weights.ctypes.data_as(ctypes.c_void_p),
            stored.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0),
            ctypes.c_int64(_ROWS),
            ctypes.c_int64(_COLUMNS),
            None if wanted is None else wanted.ctypes.data_as(ctypes.c_void_p),
        )
        try:
            again = gguf.quants.dequantize(stored, kind)
        except NotImplementedError:
            continue
        error = float(np.linalg.norm(again - weights) / np.linalg.norm(weights))
        print(f"| {kind.name} | {block} | {kept_zeros(weights, again):.1%} | {error:.3f} |")


def int4() -> None:
    """As compressed-tensors quantises, and decodes again, in groups of 128 inputs."""
    args_of, calculate_qparams, fake_quantize = _compressed_tensors()
    weights = torch.from_numpy(pruned_weights(0.5))
    groups = weights.reshape(len(weights), -1, _GROUP)
    print("| INT4 in groups of 128 | zeros kept |\n| --- | --- |")
    for symmetric in (True, False):
        args = args_of(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=_GROUP)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        again = fake_quantize(weights, scale, zero, args)
        name = "symmetric" if symmetric else "asymmetric"
        print(f"| {name} | {kept_zeros(weights.numpy(), again.numpy()):.1%} |")


def _compressed_tensors() -> tuple[Any, Any, Any]:
    try:
        quantization = importlib.import_module("compressed_tensors.quantization")
        utils = importlib.import_module("compressed_tensors.quantization.utils")
        forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    except ImportError:
        raise SystemExit("This needs the package compressed-tensors: pip install compressed-tensors") from None
    return quantization.QuantizationArgs, utils.calculate_qparams, forward.fake_quantize


def n_of_m() -> None:
    """The zeros that llm-compressor's Wanda leaves of 1:4, and what it calls a half."""
    try:
        wanda = importlib.import_module("llmcompressor.modifiers.pruning.wanda.wanda_sparsify")
    except ImportError:
        raise SystemExit("This needs the package llm-compressor: pip install llmcompressor") from None
    layer = torch.nn.Linear(64, 8, bias=False)
    pruned = wanda.sparsify_weight(layer, {layer: torch.ones(64)}, 0.25, 1, 4)
    zeros = float((pruned == 0).float().mean())
    print(f"mask_structure 1:4 of llm-compressor leaves {zeros:.0%} zeros; --pattern 1:4 of prune-cli leaves 75%.")


def csr(rows: int, rounds: int) -> None:
    vector = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    print("| sparsity | CSR, int64 indices | CSR, int32 indices |\n| --- | --- | --- |")
    for sparsity in (0.5, 0.7, 0.9):
        dense = torch.randn(rows, rows, generator=torch.Generator().manual_seed(0))
        dense[torch.rand(rows, rows, generator=torch.Generator().manual_seed(2)) < sparsity] = 0
        wide = dense.to_sparse_csr()
        narrow = torch.sparse_csr_tensor(wide.crow_indices().int(), wide.col_indices().int(), wide.values(), wide.shape)
        torch.testing.assert_close(narrow @ vector, dense @ vector, rtol=1e-3, atol=1e-3)
        products = {"dense": dense, "int64": wide, "int32": narrow}
        seconds = timed({name: lambda matrix=matrix: matrix @ vector for name, matrix in products.items()}, rounds)
        ratios = [seconds[name] / seconds["dense"] for name in ("int64", "int32")]
        print(f"| {sparsity:.0%} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def timed(run: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each, in rounds one after the other."""
    found: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, each in run.items():
            begun = time.perf_counter()
            each()
            found[name].append(time.perf_counter() - begun)
    return {name: median(each[1:]) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gguf", "ggml", "int4", "nm", "csr"])
    parser.add_argument("library", nargs="?", help="of ggml: libggml-base.so")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if given.what == "ggml":
        if given.library is None:
            parser.error("ggml needs a library: python benchmarks/runtimes.py ggml path/to/libggml-base.so")
        ggml_types(given.library)
    elif given.what == "csr":
        csr(given.rows, given.rounds)
    else:
        {"gguf": gguf_types, "int4": int4, "nm": n_of_m}[given.what]()


if __name__ == "__main__":
    main()
