"""`--method depth` on one model: the tables of docs/depth.md.

    python benchmarks/depth_quality.py examples/demo-model --out demo-depth.json
    python benchmarks/depth_quality.py MODEL --data calibration.safetensors --data-eval evaluation.safetensors

Every run is a process of its own, and its output is compared with the dense model. Results go to --out as they come,
and a second call goes on where the first one stopped; Markdown is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_cli.evaluation.perplexity import measure
from prune_cli.evaluation.requests import EvaluationRequest
from prune_cli.model.architecture import calm_libraries
from prune_cli.report.format import table

# Table -> what is asked for -> row -> options.
DEPTH_SCORES = {
    "greedy and refit": ["-o", "score=greedy"],
    "greedy": ["-o", "score=greedy", "-o", "refit=none"],
    "influence (ShortGPT)": ["-o", "score=influence", "-o", "refit=none"],
    "angular": ["-o", "score=angular", "-o", "refit=none"],
}
TABLES: dict[str, dict[str, dict[str, list[str]]]] = {
    "depth": {
        f"{count} block{'s' * (count > 1)}": {
            name: ["-m", "depth", "-o", f"remove={count}", *options] for name, options in DEPTH_SCORES.items()
        }
        for count in (1, 2)
    },
}


def run(model: Path, options: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune in a process of its own, then compare with the dense model."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        out = str(Path(folder) / "out")
        text = ["--calibration", arguments.data]
        if arguments.samples is not None:
            text += ["--samples", str(arguments.samples)]
        call = [sys.executable, "-m", "prune_cli", "prune", str(model), out, *options, *text, "-q", "--json"]
        report = json.loads(subprocess.run(call, stdout=subprocess.PIPE, check=True).stdout)
        request = EvaluationRequest(
            model=out, data=arguments.data_eval, against=str(model), eval_windows=arguments.eval_samples
        )
        comparison = measure(request).comparison
    assert comparison is not None
    return {
        "dense_perplexity": comparison.dense.perplexity,
        "perplexity": comparison.model.perplexity,
        "kl": comparison.kl_from_dense,
        "seconds": report["seconds"],
        "parameters_removed": report["structure"]["removed_shares"]["parameters"],
        "removed": [block["block"] for block in report["structure"]["blocks"] if block["new_block"] is None],
    }


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Results by table, level and row; the file is written after each, so that nothing is measured twice."""
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.tables:
        for level, rows in TABLES[name].items():
            done = results.setdefault(name, {}).setdefault(level, {})
            for row, options in rows.items():
                if row not in done:
                    done[row] = run(arguments.model, options, arguments)
                    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
                    print(f"{name}, {level}, {row}: {done[row]}", file=sys.stderr)
    return results


def show(results: dict[str, Any]) -> str:
    parts = []
    for name, levels in results.items():
        rows = list(next(iter(levels.values())))
        lines = [
            [row, *(f"{levels[level][row]['perplexity']:.2f}" if row in levels[level] else "–" for level in levels)]
            for row in rows
        ]
        removed = [f"{100 * next(iter(done.values()))['parameters_removed']:.1f} %" for done in levels.values()]
        lines.append(["parameters removed", *removed])
        parts.append(f"### {name}: perplexity\n\n" + table(["", *levels], lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="builtin", help="calibration text")
    parser.add_argument("--data-eval", default="builtin", help="evaluation text")
    parser.add_argument("--samples", type=int, help="calibration samples")
    parser.add_argument("--eval-samples", type=int, help="evaluation windows; all by default")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--out", type=Path, default=Path("depth-quality.json"), help="where the results are kept")
    parser.add_argument("--scratch", type=Path, help="where the outputs go")
    arguments = parser.parse_args()
    calm_libraries()
    results = collect(arguments)
    dense = next(iter(next(iter(next(iter(results.values())).values())).values()))["dense_perplexity"]
    print(f"{arguments.model} calibrated on {arguments.data}, evaluated on {arguments.data_eval}: dense {dense:.3f}\n")
    print(show(results))


if __name__ == "__main__":
    main()
