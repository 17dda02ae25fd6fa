"""Peak anonymous memory of a run over the depth of the model, beside the bound that the project promises.

    python benchmarks/memory.py --blocks 4 8 16
    python benchmarks/memory.py --blocks 4 8 16 --recover

Random Llamas of the same shape but for their depth; RssAnon is read from outside the process. Linux, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from watch import watch

from prune_cli.checkpoint.reader import Checkpoint

# The bound: two blocks in the float32 of the forward, so many times the hidden states of all tokens, and a constant.
BLOCKS, STATES, FIXED_BYTES = 2, 3.5, 1 << 30
# Of a recovery: one block with gradients, Adam's moments and the best epoch, in units of float32.
TRAINED_BLOCKS = 5
FLOAT32 = 4


@dataclass(frozen=True)
class Measured:
    blocks: int
    seconds: float
    peak_bytes: int
    block_bytes: int
    state_bytes: int
    bound_bytes: int
    ratio: float


def measure(blocks: int, arguments: argparse.Namespace) -> Measured:
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        make = [sys.executable, str(Path(__file__).with_name("make_random_llama.py")), str(model)]
        shape = ["--hidden", arguments.hidden, "--samples", arguments.samples, "--seq-len", arguments.seq_len]
        watch([*make, "--blocks", str(blocks), *map(str, shape)])
        tokens = str(model / "tokens.safetensors")
        run = watch(_recovery(model, out, tokens) if arguments.recover else _pruning(model, out, tokens, arguments))
        block = FLOAT32 * sum(
            entry.count for name, entry in Checkpoint.open(model).entries.items() if name.startswith("model.layers.0.")
        )
    states = FLOAT32 * arguments.samples * arguments.seq_len * arguments.hidden
    bound = int((TRAINED_BLOCKS if arguments.recover else BLOCKS) * block + STATES * states + FIXED_BYTES)
    return Measured(blocks, run.seconds, run.peak_bytes, block, states, bound, run.peak_bytes / bound)


def _pruning(model: Path, out: Path, tokens: str, arguments: argparse.Namespace) -> list[str]:
    prune = [sys.executable, "-m", "prune_cli", "prune", str(model), str(out), "-m", arguments.method, "-s", "0.5"]
    return [*prune, "-q", "--device", "cpu", "--calibration", tokens, *arguments.options]


def _recovery(model: Path, out: Path, tokens: str) -> list[str]:
    """Of a model that is pruned first, over its tokens alone, so that they are all that the hidden states are of."""
    command = [sys.executable, "-m", "prune_cli"]
    watch([*command, "prune", str(model), f"{out}-pruned", "-m", "magnitude", "-q"])
    texts = ["--calibration", tokens, "--eval", tokens, "--self-calibration", "0", "--epochs", "1"]
    return [*command, "recover", f"{out}-pruned", str(out), "--teacher", str(model), *texts, "-q", "--device", "cpu"]


def show(rows: list[Measured]) -> None:
    table = Table("blocks", "seconds", "peak MiB", "one block MiB", "hidden states MiB", "bound MiB", "peak / bound")
    for row in rows:
        sizes = (row.peak_bytes, row.block_bytes, row.state_bytes, row.bound_bytes)
        table.add_row(
            str(row.blocks), f"{row.seconds:.1f}", *(f"{size / 2**20:.0f}" for size in sizes), f"{row.ratio:.2f}"
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    first, last = rows[0], rows[-1]
    print(f"peak with {last.blocks} blocks / with {first.blocks}: {last.peak_bytes / first.peak_bytes:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16, help="many samples let the hidden states outweigh the rest")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--recover", action="store_true", help="watch a recovery, of one epoch, instead of prune")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="last: more options of prune-cli prune")
    parser.add_argument("--scratch", type=Path, help="where models and outputs go; default: the temporary folder")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    rows: list[Measured] = []
    for blocks in arguments.blocks:
        print(f"{blocks} blocks", file=sys.stderr)
        rows.append(measure(blocks, arguments))
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)


if __name__ == "__main__":
    main()
