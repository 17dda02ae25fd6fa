"""Scores of `--method experts`, and zeros in the experts instead, on one mixture: the table of docs/experts.md.

python examples/train_demo_moe.py MOE && python benchmarks/expert_quality.py MOE
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from prune_cli import prune
from prune_cli.evaluation.perplexity import measure
from prune_cli.evaluation.requests import EvaluationRequest
from prune_cli.model.architecture import calm_libraries
from prune_cli.report.format import table

SCORES = ("reap", "man", "msan", "frequency", "random")
SHARES = (0.25, 0.5)
# Half of the experts' weights, as removing half of the experts removes them.
ZEROS = {
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "admm": {"method": "admm"},
    "admm, dense target": {"preset": "best"},
}
EXPERTS = ("*.experts.*",)


def perplexity(model: Path, arguments: argparse.Namespace, **request: Any) -> float:
    """Of `model` on the evaluation text after what `request` says."""
    with tempfile.TemporaryDirectory() as folder:
        text = {} if request.get("options") == {"score": "random"} else {"calibration": arguments.data}
        limits = {"samples": arguments.samples, "seq_len": arguments.seq_len} if text else {}
        prune(str(model), str(Path(folder) / "out"), **text, **limits, **request)
        return _measured(Path(folder) / "out", arguments)


def _measured(model: Path, arguments: argparse.Namespace) -> float:
    request = EvaluationRequest(model=str(model), data=arguments.data_eval, eval_windows=arguments.eval_samples)
    return measure(request).evaluation.perplexity


def mean_of_lots(model: Path, arguments: argparse.Namespace, share: float) -> float:
    """Of three draws, the mean perplexity."""
    options = {"score": "random"}
    drawn = [
        perplexity(model, arguments, method="experts", sparsity=share, options=options, seed=seed) for seed in range(3)
    ]
    return sum(drawn) / len(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint with experts")
    parser.add_argument("--data", default="builtin", help="calibration text")
    parser.add_argument("--data-eval", default="builtin", help="evaluation text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, help="windows of the evaluation text [default: all]")
    arguments = parser.parse_args()
    calm_libraries()
    print(f"dense {_measured(arguments.model, arguments):.2f}", flush=True)
    lines = []
    for score in SCORES:
        line = [score]
        for share in SHARES:
            value = (
                mean_of_lots(arguments.model, arguments, share)
                if score == "random"
                else perplexity(arguments.model, arguments, method="experts", sparsity=share, options={"score": score})
            )
            line.append(f"{value:.2f}")
        lines.append(line)
        print(line, flush=True)
    print(table(["experts removed", *(f"{100 * share:g} %" for share in SHARES)], lines), flush=True)
    rows = []
    for name, request in ZEROS.items():
        value = perplexity(arguments.model, arguments, sparsity=0.5, include=EXPERTS, **request)
        rows.append([name, f"{value:.2f}"])
        print(rows[-1], flush=True)
    print(table(["zeros in the experts", "50 %"], rows))


if __name__ == "__main__":
    main()
