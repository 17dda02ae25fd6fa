"""`recover --how block` after each kind of pruning: the tables of docs/recover.md, and whether its promises hold.

    python benchmarks/recover_quality.py examples/demo-model --data-eval builtin builtin:python --out demo.json
    python benchmarks/recover_quality.py MODEL --data calibration.safetensors --data-eval evaluation.safetensors

Every run is a process of its own, watched from outside, on one thread; losses are those of `prune-cli eval --against`.
Results go to --out as they come, and a second call goes on where the first one stopped. Ends with exit code 1 where a
promise is not kept. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from watch import Watched, watch

from prune_cli.evaluation.perplexity import measure
from prune_cli.evaluation.requests import EvaluationRequest
from prune_cli.model.architecture import calm_libraries
from prune_cli.report.format import table

BEST = ["--preset", "best"]
LEVELS: dict[str, list[str]] = {
    "50 %": [*BEST, "--sparsity", "0.5"],
    "70 %": [*BEST, "--sparsity", "0.7"],
    "2:4": [*BEST, "--pattern", "2:4"],
    "two blocks less": ["-m", "depth", "-o", "remove=2"],
    "width less 25 %": ["-m", "width", "--sparsity", "0.25"],
}
# What of the increase of the loss must be gone.
PROMISED = {"50 %": 0.15, "70 %": 0.25, "2:4": 0.25, "two blocks less": 0.25, "width less 25 %": 0.25}
# Of the time of --preset best on the same tokens.
MOST_TIME = 3.0


def run(level: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune and recover, each watched; the loss increases by text, before and after."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        pruned, out = f"{folder}/pruned", f"{folder}/out"
        text = ["--calibration", arguments.data, "-q"]
        command = [sys.executable, "-m", "prune_cli"]
        first = watch([*command, "prune", arguments.model, pruned, *LEVELS[level], *text])
        recover = [*command, "recover", pruned, out, "--teacher", arguments.model, *text]
        second = watch([*recover, "--eval", arguments.data_eval[0], *arguments.options])
        return {
            "increases": {
                data: [_increase(each, data, arguments) for each in (pruned, out)] for data in arguments.data_eval
            },
            "prune": _cost(first),
            "recover": _cost(second),
        }


def _cost(watched: Watched) -> dict[str, float]:
    return {"seconds": watched.seconds, "peak_mib": watched.peak_bytes / 2**20}


def _increase(model: str, data: str, arguments: argparse.Namespace) -> float:
    request = EvaluationRequest(model=model, data=data, against=arguments.model, eval_windows=arguments.windows)
    comparison = measure(request).comparison
    assert comparison is not None
    return comparison.loss_increase


def rows(results: dict[str, Any]) -> list[list[str]]:
    return [
        [
            level,
            data,
            f"{before:.4f}",
            f"{after:.4f}",
            f"{100 * (1 - after / before):.0f} %",
            f"{100 * PROMISED[level]:.0f} %",
            f"{found['prune']['seconds']:.0f}",
            f"{found['recover']['seconds']:.0f}",
            f"{found['recover']['peak_mib']:.0f}",
        ]
        for level, found in results.items()
        for data, (before, after) in found["increases"].items()
    ]


def broken(results: dict[str, Any]) -> list[str]:
    """The promises that are not kept."""
    told = []
    for level, found in results.items():
        for data, (before, after) in found["increases"].items():
            if 1 - after / before < PROMISED[level]:
                told.append(f"{level} on {data}: {100 * (1 - after / before):.0f} % of the increase is gone")
        ratio = found["recover"]["seconds"] / found["prune"]["seconds"]
        if "best" in LEVELS[level] and ratio > MOST_TIME:
            told.append(f"{level}: {ratio:.1f} times the time of --preset best")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="builtin", help="text to prune and to recover with")
    parser.add_argument("--data-eval", nargs="+", default=["builtin"], help="texts to judge by")
    parser.add_argument("--windows", type=int, help="of each text to judge by [default: all]")
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--out", type=Path, default=Path("recover-quality.json"), help="where the results are kept")
    parser.add_argument("--scratch", type=Path, help="where the outputs go")
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="last: more options of prune-cli recover"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    calm_libraries()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for level in arguments.levels:
        if level not in results:
            results[level] = run(level, arguments)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{level}: {results[level]}", file=sys.stderr)
    header = ["", "text", "increase", "recovered", "gone", "promised", "s to prune", "s to recover", "peak MiB"]
    print(table(header, rows(results)))
    told = broken(results)
    sys.exit("\n".join(told) if told else 0)


if __name__ == "__main__":
    main()
