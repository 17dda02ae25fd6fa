"""Structured pruning against the papers' own rules on one model: the tables of docs/structured.md.

    python benchmarks/structured_quality.py examples/demo-model --out demo.json

Ours are runs of the command line; the papers' rules are computed in memory (`width_papers.py`). All are judged on the
same windows. Results go to --out as they come, and a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from width_papers import loss_of, pruned_by_paper

from prune_cli.engine.open_model import open_model
from prune_cli.engine.texts import TextReader
from prune_cli.model.architecture import calm_libraries, load_tokenizer
from prune_cli.preflight.models_and_texts import open_text
from prune_cli.report.format import table
from prune_cli.request.request import PruneRequest
from prune_cli.structured.units import GroupName

LEVELS = {"12.5 %": 0.125, "25 %": 0.25, "50 %": 0.5}
# Rules of papers: name -> rule; ours: name -> options.
PAPERS = {"CFSP (no refit)": "cfsp", "FLAP (with bias)": "flap"}
OURS = {
    "obs, no refit": ["-o", "refit=none"],
    "cfsp scores, default refit": ["-o", "score=cfsp"],
    "flap scores, default refit": ["-o", "score=flap"],
    "wanda scores, default refit": ["-o", "score=wanda"],
    "obs, refit of readers to the pruned stream": ["-o", "refit=consumers", "-o", "alpha=0"],
    "obs, refit of readers to the dense model": ["-o", "refit=consumers"],
    "default: obs, refit of all maps to the dense model": [],
    "default with blocks of their own sizes": ["-o", "uniform=false"],
}


def windows(model: Path, source: str, role: str) -> torch.Tensor:
    opened = open_model(PruneRequest(model=str(model), out=model.parent / "unused", calibration=source), writes=False)
    reader = TextReader(opened.model, load_tokenizer(model, False), seq_len=None, seed=0)
    return reader.read(open_text(source), role, None).ids  # pyright: ignore[reportArgumentType]


def ours(
    arguments: argparse.Namespace, options: list[str], part: GroupName, share: float, judged: torch.Tensor
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        command = [sys.executable, "-m", "prune_cli", "prune", str(arguments.model), out, "-m", "width", "-q"]
        command += ["-o", f"parts={part}", "-s", str(share), *options, "--calibration", arguments.data]
        subprocess.run(command, check=True)
        return loss_of(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), judged)


def measure(arguments: argparse.Namespace, row: str, part: GroupName, share: float, judged: torch.Tensor) -> float:
    if row not in PAPERS:
        return ours(arguments, OURS[row], part, share, judged)
    ids = windows(arguments.model, arguments.data, "calibration")
    return loss_of(pruned_by_paper(arguments.model, ids, PAPERS[row], part, share), judged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="builtin", help="calibration text")
    parser.add_argument("--data-eval", default="builtin", help="evaluation text")
    parser.add_argument("--heads", type=float, default=0.25, help="the share of the heads that goes")
    parser.add_argument("--windows", type=int, help="judge on the first so many windows [default: all]")
    parser.add_argument("--rows", nargs="+", choices=[*PAPERS, *OURS], default=[*PAPERS, *OURS], help="only these")
    parser.add_argument("--out", type=Path, default=Path("structured.json"), help="where the results are kept")
    arguments = parser.parse_args()
    calm_libraries()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    judged = windows(arguments.model, arguments.data_eval, "evaluation")[: arguments.windows]
    dense = loss_of(AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval(), judged)
    columns: dict[str, tuple[GroupName, float]] = {f"MLP {name}": ("mlp", share) for name, share in LEVELS.items()}
    columns[f"heads {100 * arguments.heads:g} %"] = ("heads", arguments.heads)
    for row in arguments.rows:
        for column, (part, share) in columns.items():
            if column not in results.setdefault(row, {}):
                results[row][column] = measure(arguments, row, part, share, judged)
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{row}, {column}: {results[row][column] - dense:.4f}", file=sys.stderr)
    print(f"{arguments.model}: dense perplexity {math.exp(dense):.3f} on {len(judged)} windows\n")
    for title, value in (("Perplexity", math.exp), ("Increase of the loss, nats per token", lambda loss: loss - dense)):
        digits = 2 if title == "Perplexity" else 4
        lines = [[row, *(f"{value(line[column]):.{digits}f}" for column in columns)] for row, line in results.items()]
        print(f"### {title}\n\n{table(['', *columns], lines)}\n")


if __name__ == "__main__":
    main()
