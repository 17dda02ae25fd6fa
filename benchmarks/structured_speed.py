"""Does a structurally smaller model run faster here? Prunes a random-weight Llama and benches it against itself.

    python benchmarks/structured_speed.py /tmp/speed

Each case takes a quarter of the blocks or of the MLP channels; `prune-cli bench` measures it in turn with the dense
model, in one run. Random weights are as fast as trained ones. Only the ratios carry over to other machines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from make_random_llama import TOKENS

HERE = Path(__file__).parent
CASES = {
    "25 % fewer blocks": ["--method", "depth", "--sparsity", "0.25", "-o", "score=influence"],
    "25 % fewer MLP channels": ["--method", "width", "--sparsity", "0.25", "-o", "parts=mlp"],
}
FIGURES = ("parameters", "bytes_on_disk", "peak_running_bytes", "prefill", "decode", "latency_median")


def prune_cli(*arguments: object) -> str:
    command = [sys.executable, "-m", "prune_cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def make_dense(folder: Path, arguments: argparse.Namespace) -> None:
    if not folder.exists():
        sizes = ["--blocks", str(arguments.blocks), "--hidden", str(arguments.hidden)]
        sizes += ["--samples", "4", "--seq-len", "128"]
        subprocess.run([sys.executable, str(HERE / "make_random_llama.py"), str(folder), *sizes], check=True)


def row(name: str, result: dict[str, Any]) -> str:
    ratios = {ratio["figure"]: ratio for ratio in result["ratios"]}
    cells = []
    for figure in FIGURES:
        ratio = ratios[figure]
        spread = "" if ratio["lowest"] == ratio["highest"] else f" ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        cells.append(f"{ratio['ratio']:.2f}{spread}")
    return f"| {name} | {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the models; what is there already is used again")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=list(CASES), help="one case")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    dense = arguments.folder / "dense"
    make_dense(dense, arguments)
    rows, warnings = [], []
    for name, method in CASES.items():
        if arguments.only not in (None, name):
            continue
        smaller = arguments.folder / name.replace(" ", "-").replace("%", "percent")
        if not smaller.exists():
            prune_cli("prune", dense, smaller, *method, "--calibration", dense / TOKENS, "-q")
        asked = ("--prompt-tokens", arguments.prompt_tokens, "--new-tokens", arguments.new_tokens)
        output = prune_cli("bench", smaller, "--against", dense, *asked, "--repeats", arguments.repeats, "--json", "-q")
        result = json.loads(output)
        rows.append(row(name, result))
        warnings += [f"{name}: {warning}" for warning in result["warnings"]]
    print(f"| smaller / dense | {' | '.join(figure.replace('_', ' ') for figure in FIGURES)} |")
    print("| --- " * (len(FIGURES) + 1) + "|")
    print("\n".join([*rows, *warnings]))


if __name__ == "__main__":
    main()
