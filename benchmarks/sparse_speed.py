"""How fast sparse safetensors are made and read back, beside `cp` of the dense files in the same rounds.

    python benchmarks/sparse_speed.py [--megabytes 500] [--rounds 3] [--folder /tmp]

Throughput is that of the dense bytes, wherever they are read or written; every side ends with its bytes on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file

from prune_cli.sparse.convert import ConvertRequest, convert

_ROWS, _COLUMNS, _SHARDS = 4096, 2048, 2


def make_checkpoint(folder: Path, megabytes: int, pattern: str) -> Path:
    """Random bfloat16 matrices with zeros: a share of them ('0.5'), or N of every M kept ('2:4')."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    matrices = max(megabytes * 1_000_000 // (2 * _ROWS * _COLUMNS), _SHARDS)
    files, shards = {}, [f"model-{n + 1:05}-of-{_SHARDS:05}.safetensors" for n in range(_SHARDS)]
    for number, file in enumerate(shards):
        names = [f"model.layers.{matrix}.weight" for matrix in range(number, matrices, _SHARDS)]
        save_file({name: _matrix(numbers, pattern) for name in names}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text("{}")
    return folder


def _matrix(numbers: np.random.Generator, pattern: str) -> torch.Tensor:
    weight, places = (torch.from_numpy(numbers.random((_ROWS, _COLUMNS), np.float32)) for _ in range(2))
    if ":" in pattern:
        keep, of = map(int, pattern.split(":"))
        kept = (places.reshape(-1, of).argsort(1).argsort(1) < keep).reshape(weight.shape)
    else:
        kept = places >= float(pattern)
    return torch.where(kept, weight + 1, 0).bfloat16()


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.close(descriptor)


def _timed(work: Callable[[], object], made: Path) -> float:
    shutil.rmtree(made, ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    print("| zeros | bits per weight | cp (GB/s) | encode (GB/s) | of cp | decode (GB/s) | of cp |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for pattern in options.patterns:
        with TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            dense = make_checkpoint(folder / "dense", options.megabytes, pattern)
            copied, sparse, again = folder / "copied", folder / "sparse", folder / "again"
            times: dict[str, list[float]] = {"cp": [], "encode": [], "decode": []}
            for _ in range(options.rounds):
                times["cp"].append(_timed(partial(_copy, dense, copied), copied))
                times["encode"].append(_timed(partial(convert, ConvertRequest(str(dense), sparse, "sparse")), sparse))
                times["decode"].append(_timed(partial(convert, ConvertRequest(str(sparse), again, "dense")), again))
            size = _bytes(dense)
            ratios = {
                side: median(cp / own for cp, own in zip(times["cp"], times[side], strict=True)) for side in times
            }
            speeds = {side: size / median(times[side]) / 1e9 for side in times}
            print(
                f"| {pattern} | {16 * _bytes(sparse) / size:.3f} | {speeds['cp']:.2f} | {speeds['encode']:.2f} | "
                f"{ratios['encode']:.0%} | {speeds['decode']:.2f} | {ratios['decode']:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
