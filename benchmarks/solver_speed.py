"""Solvers and refinements at 50 %: seconds of work as ratios of Wanda's and of llm-compressor's SparseGPT.

    python benchmarks/make_random_llama.py /tmp/llama
    python benchmarks/solver_speed.py /tmp/llama /tmp/llama/tokens.safetensors --llm-compressor /tmp/llmc/bin/python

Repeats are interleaved, medians are compared, every contestant runs in a process of its own. Linux, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from watch import watch

from prune_cli.engine.open_model import pick_batch_size
from prune_cli.request.presets import PRESETS

CONTESTANTS = Path(__file__).parent / "contestants"
PEER = "llm-compressor's sparsegpt"
OURS: dict[str, dict[str, object]] = {
    "wanda": {"method": "wanda"},
    "dsnot": {"method": "dsnot"},
    "wanda + swaps": {"method": "wanda", "refine": "swaps"},
    "sparsegpt": {"method": "sparsegpt"},
    "balanced": PRESETS["balanced"],
    "best": PRESETS["best"],
}
# (what, of what, at most)
TARGETS = [
    ("sparsegpt", PEER, 0.6),
    ("best", PEER, 1.5),
    ("balanced", PEER, None),
    ("dsnot", "wanda", 1.2),
    ("wanda + swaps", "wanda", 2.0),
]


def work_of(command: list[str], scratch: Path) -> tuple[float, int]:
    """Seconds that a contestant reports of itself, and its peak memory."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = str(Path(folder) / "out")
        watched = watch([out if argument == "OUT" else argument for argument in command])
    return sum(json.loads(watched.stdout.strip().splitlines()[-1]).values()), watched.peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors with input_ids (samples, length)")
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="the Python of an environment with llm-compressor")
    parser.add_argument("--only", nargs="+", choices=list(OURS), default=list(OURS), help="which of ours")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where outputs go; default: beside the model, on the same disk")
    arguments = parser.parse_args()
    with safe_open(arguments.tokens, framework="pt") as stored:
        length = stored.get_slice("input_ids").get_shape()[1]
    shared = [str(arguments.model), str(arguments.tokens)]
    batch = str(pick_batch_size("auto", torch.device("cpu"), length))
    commands = {
        name: [sys.executable, str(CONTESTANTS / "ours.py"), *shared, batch, "OUT", json.dumps(options)]
        for name, options in OURS.items()
        if name in arguments.only
    }
    if arguments.llm_compressor:
        script = str(CONTESTANTS / "llm_compressor.py")
        commands[PEER] = [arguments.llm_compressor, script, *shared, "1", "OUT", "sparsegpt"]
    scratch = arguments.scratch or arguments.model.resolve().parent
    taken: dict[str, list[tuple[float, int]]] = {}
    for repeat in range(arguments.repeats):
        for name, command in commands.items():
            taken.setdefault(name, []).append(work_of(command, scratch))
            print(f"repeat {repeat + 1}: {name} {taken[name][-1][0]:.1f} s", file=sys.stderr)
    seconds = {name: median(work for work, _ in runs) for name, runs in taken.items()}
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("", "work s", "peak MiB", title="medians")
    for name, runs in taken.items():
        table.add_row(name, f"{seconds[name]:.1f}", f"{max(peak for _, peak in runs) / 2**20:.0f}")
    console.print(table)
    for what, of, limit in TARGETS:
        if what in seconds and of in seconds:
            ratio = seconds[what] / seconds[of]
            verdict = "" if limit is None else f", target at most {limit:g}: {'met' if ratio <= limit else 'MISSED'}"
            console.print(f"{what} / {of} = {ratio:.3f}{verdict}")


if __name__ == "__main__":
    main()
