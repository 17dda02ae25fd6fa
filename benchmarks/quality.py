"""Methods, steps and presets on one model at several sparsities: the tables of docs/quality.md.

    python benchmarks/quality.py examples/demo-model --data builtin --data-eval builtin --out demo.json

Every run is a process of its own, watched from outside. Results go to --out as they come, and a second call goes on
where the first one stopped; Markdown is printed at the end. Linux.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from watch import watch

from prune_cli.evaluation.perplexity import measure
from prune_cli.evaluation.requests import EvaluationRequest
from prune_cli.model.architecture import calm_libraries
from prune_cli.report.format import table

LEVELS: dict[str, list[str]] = {
    "50 %": ["--sparsity", "0.5"],
    "60 %": ["--sparsity", "0.6"],
    "70 %": ["--sparsity", "0.7"],
    "2:4": ["--pattern", "2:4"],
    "4:8": ["--pattern", "4:8"],
}
DENSE = ["--target", "dense"]
SWAPS = ["--refine", "swaps"]
# What a row's name stands for.
COMBINATIONS: dict[str, list[str]] = {
    "random": ["-m", "random"],
    "magnitude": ["-m", "magnitude"],
    "wanda (fast)": ["--preset", "fast"],
    "ria": ["-m", "ria"],
    "dsnot": ["-m", "dsnot"],
    "dsnot from magnitude": ["-m", "dsnot", "-o", "start=magnitude"],
    "dsnot from sparsegpt": ["-m", "dsnot", "-o", "start=sparsegpt"],
    "wanda + swaps": ["-m", "wanda", *SWAPS],
    "wanda + swaps, dense target": ["-m", "wanda", *SWAPS, *DENSE],
    "sparsegpt": ["-m", "sparsegpt"],
    "sparsegpt, dense target": ["-m", "sparsegpt", *DENSE],
    "wanda + swaps + reconstruct, dense target": ["-m", "wanda", *SWAPS, "--reconstruct", *DENSE],
    "admm (balanced)": ["--preset", "balanced"],
    "admm, dense target (best)": ["--preset", "best"],
}
ALLOCATIONS = ("erk", "global", "owl", "atp")
ALLOCATED: dict[str, list[str]] = {
    f"{name}, {allocation}": [*COMBINATIONS[name], "--allocate", allocation]
    for name in ("wanda (fast)", "admm, dense target (best)")
    for allocation in ALLOCATIONS
}
BEST = COMBINATIONS["admm, dense target (best)"]
# What else `best` could be, one change at a time.
TUNING: dict[str, list[str]] = {
    "best": BEST,
    **{
        f"best with {' '.join(changed)}": [*BEST, *(word for each in changed for word in ("-o", each))]
        for changed in (
            ["per=row"],
            ["damping=0.1"],
            ["damping=0.01"],
            ["steps=20", "polish=10"],
            ["steps=15", "polish=10", "relax=1"],
            ["polish=0"],
            ["relax=1"],
            ["rho=0.5"],
            ["rho=2"],
            ["alpha=0.6"],
            ["alpha=0.9"],
            ["alpha=1"],
        )
    },
}
ROWS = {"methods": COMBINATIONS, "allocations": ALLOCATED, "tuning": TUNING}


def run(model: Path, options: Sequence[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Prune in a process of its own, then compare with the dense model."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        out = str(Path(folder) / "out")
        text = [] if "magnitude" in options or "random" in options else ["--calibration", arguments.data]
        pruned = watch([sys.executable, "-m", "prune_cli", "prune", str(model), out, *options, *text, "-q", "--json"])
        report: dict[str, Any] = json.loads(pruned.stdout)
        request = EvaluationRequest(model=out, data=arguments.data_eval, against=str(model))
        comparison = measure(request).comparison
    assert comparison is not None
    return {
        "dense_perplexity": comparison.dense.perplexity,
        "perplexity": comparison.model.perplexity,
        "loss_increase": comparison.loss_increase,
        "kl": comparison.kl_from_dense,
        "seconds": report["seconds"],
        "peak_mib": pruned.peak_bytes / 2**20,
        "sparsity": report["totals"]["sparsity_of_pruned"],
    }


def collect(arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """All results by row and level; the file is written after each, so that nothing is measured twice."""
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name, options in ROWS[arguments.rows].items():
        for level in arguments.levels:
            if level in results.get(name, {}) or (arguments.rows == "allocations" and ":" in level):
                continue
            results.setdefault(name, {})[level] = run(arguments.model, [*options, *LEVELS[level]], arguments)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name} {level}: {results[name][level]}", file=sys.stderr)
    return results


def rows(results: dict[str, dict[str, dict[str, float]]], levels: Sequence[str], key: str, digits: int) -> str:
    lines = [
        [name, *(f"{line[level][key]:.{digits}f}" if level in line else "–" for level in levels)]
        for name, line in results.items()
    ]
    return table(["", *levels], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="builtin", help="calibration text")
    parser.add_argument("--data-eval", default="builtin", help="evaluation text")
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--rows", choices=list(ROWS), default="methods", help="which table")
    parser.add_argument("--out", type=Path, default=Path("quality.json"), help="where the results are kept")
    parser.add_argument("--scratch", type=Path, help="where the outputs go")
    arguments = parser.parse_args()
    calm_libraries()
    results = collect(arguments)
    dense = next(iter(next(iter(results.values())).values()))["dense_perplexity"]
    print(f"{arguments.model} calibrated on {arguments.data}, evaluated on {arguments.data_eval}: dense {dense:.3f}")
    for key, title, digits in (
        ("perplexity", "Perplexity", 2),
        ("loss_increase", "Increase of the loss, nats per token", 4),
        ("kl", "KL divergence from the dense model, nats per token", 4),
        ("seconds", "Seconds", 1),
        ("peak_mib", "Peak memory, MiB", 0),
    ):
        print(f"\n### {title}\n\n{rows(results, arguments.levels, key, digits)}")


if __name__ == "__main__":
    main()
