"""Every method on one model at several sparsities: the table in the README.

    python benchmarks/quality.py examples/demo-model --data builtin --data-eval builtin

Prints Markdown; perplexity on the evaluation text, the sparsity counted in the written files.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from methods import load_method, method_names
from prune_cli import prune
from prune_cli.architecture import calm_libraries
from prune_cli.markdown import table
from prune_cli.report import Report

LEVELS: dict[str, dict[str, object]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "70 %": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}


SWAPS: dict[str, object] = {"refine": "swaps"}
FIT: dict[str, object] = {"reconstruct": True}
DENSE: dict[str, object] = {"target": "dense"}
# What a row's name stands for, beside every method by itself.
COMBINATIONS: dict[str, dict[str, object]] = {
    **{method: {"method": method} for method in method_names()},
    "wanda + swaps": {"method": "wanda", **SWAPS},
    "wanda + swaps + reconstruct": {"method": "wanda", **SWAPS, **FIT},
    "wanda + swaps + reconstruct, dense target": {"method": "wanda", **SWAPS, **FIT, **DENSE},
    "sparsegpt, dense target": {"method": "sparsegpt", **DENSE},
    "admm, dense target": {"method": "admm", **DENSE},
}


def measure(model: Path, options: dict[str, object], arguments: argparse.Namespace) -> Report:
    text = {"calibration": arguments.data} if load_method(str(options["method"])).needs else {}
    with tempfile.TemporaryDirectory() as folder:
        return prune(model, Path(folder) / "out", eval=arguments.data_eval, **text, **options)


def perplexities(report: Report) -> tuple[float, float]:
    assert report.evaluation is not None
    return report.evaluation.before.perplexity, report.evaluation.after.perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="builtin", help="calibration text")
    parser.add_argument("--data-eval", default="builtin", help="evaluation text")
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    arguments = parser.parse_args()
    calm_libraries()
    rows: list[list[str]] = []
    dense = 0.0
    for name, combination in COMBINATIONS.items():
        row = [name]
        for level in arguments.levels:
            dense, pruned = perplexities(measure(arguments.model, {**combination, **LEVELS[level]}, arguments))
            row.append(f"{pruned:.2f}")
        rows.append(row)
    print(f"Perplexity of {arguments.model} on {arguments.data_eval}, dense {dense:.2f}\n")
    print(table(["method", *arguments.levels], rows))


if __name__ == "__main__":
    main()
