"""Methods and presets on a real pretrained model, beside llm-compressor on the same tokens: tables for docs/quality.md.

    python benchmarks/real_models.py smollm2 --calibration valid.txt --evaluation test.txt --windows 16 64 \\
        --llm-compressor /tmp/llmc/bin/python --out smollm2.json

A text is cut into its first windows of --seq-len tokens without special tokens; a .safetensors file with input_ids is
taken as it is. Every run is a process of its own on one thread: its CPU seconds and peak memory are the whole
process's. Results go to --out as they come, and a second call goes on where the first one stopped. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from watch import watch

CONTESTANTS = Path(__file__).parent / "contestants"
# What a level is for prune-cli, and for llm-compressor (its 2:4 keeps 2 of 4 too).
LEVELS = {
    "50 %": (["--sparsity", "0.5"], ["0.5", "0:0"]),
    "70 %": (["--sparsity", "0.7"], ["0.7", "0:0"]),
    "2:4": (["--pattern", "2:4"], ["0.5", "2:4"]),
}
OURS: dict[str, list[str]] = {
    "magnitude": ["-m", "magnitude"],
    "wanda": ["-m", "wanda"],
    "ria": ["-m", "ria"],
    "dsnot": ["-m", "dsnot"],
    "sparsegpt": ["-m", "sparsegpt"],
    "balanced": ["--preset", "balanced"],
    "best": ["--preset", "best"],
    "max": ["--preset", "max"],
}
PEERS = {"llm-compressor's wanda": "wanda", "llm-compressor's sparsegpt": "sparsegpt"}
COLUMNS = ("perplexity", "increase of the loss", "of SparseGPT's", "KL", "same top 1", "CPU s", "peak MiB")
Results = dict[str, dict[str, float]]


def tokens_of(model: Path, text: Path, windows: int, length: int, file: Path) -> Path:
    """Write the first `windows` x `length` tokens of `text` (all with 0) to `file`."""
    if text.suffix == ".safetensors":
        ids = load_file(text)["input_ids"]
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
        flat = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
        ids = torch.tensor(flat)[: len(flat) // length * length].view(-1, length)
    if windows > len(ids):
        sys.exit(f"{text} holds {len(ids)} windows, not {windows}")
    save_file({"input_ids": ids[: windows or len(ids)].long().contiguous()}, file)
    return file


def cpu_seconds() -> float:
    """Of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command_of(name: str, level: str, tokens: Path, out: str, arguments: argparse.Namespace) -> list[str]:
    """The process that prunes, of ours or of a peer."""
    ours, theirs = LEVELS[level]
    if name in PEERS:
        script = str(CONTESTANTS / "llm_compressor.py")
        return [arguments.llm_compressor, script, str(arguments.model), str(tokens), "1", out, PEERS[name], *theirs]
    row, *more = name.split()
    options = [*OURS[row], *more]
    text = [] if row == "magnitude" else ["--calibration", str(tokens)]
    return [sys.executable, "-m", "prune_cli", "prune", str(arguments.model), out, *options, *ours, *text, "-q"]


def measured(name: str, level: str, tokens: Path, evaluation: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Prune, then compare with the dense model on the evaluation windows."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        out, before = str(Path(folder) / "out"), cpu_seconds()
        pruned = watch(command_of(name, level, tokens, out, arguments))
        seconds = cpu_seconds() - before
        command = [sys.executable, "-m", "prune_cli", "eval", out, "--data", str(evaluation)]
        told = watch([*command, "--against", str(arguments.model), "-q", "--json"])
    comparison: dict[str, Any] = json.loads(told.stdout)["comparison"]
    return {
        "dense_perplexity": comparison["dense"]["perplexity"],
        "perplexity": comparison["model"]["perplexity"],
        "loss_increase": comparison["loss_increase"],
        "standard_error": comparison["loss_increase_standard_error"],
        "kl": comparison["kl_from_dense"],
        "top1": comparison["top1_agreement"],
        "cpu_seconds": seconds,
        "peak_mib": pruned.peak_bytes / 2**20,
    }


def collect(arguments: argparse.Namespace, folder: Path) -> Results:
    """All results by "row | windows | level"; the file is written after each."""
    results: Results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    evaluation = tokens_of(
        arguments.model,
        arguments.evaluation,
        arguments.evaluation_windows,
        arguments.seq_len,
        folder / "eval.safetensors",
    )
    for windows in arguments.windows:
        file = folder / f"calibration-{windows}.safetensors"
        tokens = tokens_of(arguments.model, arguments.calibration, windows, arguments.seq_len, file)
        for level in arguments.levels:
            for name in rows_of(arguments):
                key = f"{name} | {windows} | {level}"
                if key not in results:
                    results[key] = measured(name, level, tokens, evaluation, arguments)
                    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
                    print(f"{key}: {results[key]}", file=sys.stderr)
    return results


def rows_of(arguments: argparse.Namespace) -> list[str]:
    return [*(arguments.rows or OURS), *(PEERS if arguments.llm_compressor else ())]


def line(name: str, result: dict[str, float], reference: float | None) -> str:
    share = "–" if reference is None else f"{result['loss_increase'] / reference:.2f}"
    cells = (
        f"{result['perplexity']:.2f}",
        f"{result['loss_increase']:.4f} ± {result['standard_error']:.4f}",
        share,
        f"{result['kl']:.4f}",
        f"{result['top1']:.1%}",
        f"{result['cpu_seconds']:.0f}",
        f"{result['peak_mib']:.0f}",
    )
    return f"| {' | '.join((name, *cells))} |"


def tables(arguments: argparse.Namespace, results: Results) -> str:
    """One table for each number of windows and level; the reference is the peer's SparseGPT, else ours."""
    found: list[str] = []
    for windows in arguments.windows:
        for level in arguments.levels:
            here = {name: results[f"{name} | {windows} | {level}"] for name in rows_of(arguments)}
            reference = next((here[name]["loss_increase"] for name in [*PEERS, "sparsegpt"][1:] if name in here), None)
            head = [f"| {' | '.join(('', *COLUMNS))} |", f"|{' --- |' * (len(COLUMNS) + 1)}"]
            lines = [line(name, result, reference) for name, result in here.items()]
            found.append("\n".join([f"{windows} windows, {level}\n", *head, *lines]))
    return "\n\n".join(found)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text, or safetensors with input_ids")
    parser.add_argument("--evaluation", type=Path, required=True, help="another text, likewise")
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64], help="how many for calibration")
    parser.add_argument("--evaluation-windows", type=int, default=22, help="0: all")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--rows", nargs="+", help="of ours; 'best -o alpha=1' is best with an option")
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="the Python of an environment with llm-compressor")
    parser.add_argument("--out", type=Path, default=Path("real_models.json"), help="where the results are kept")
    parser.add_argument("--scratch", type=Path, help="where the outputs go")
    arguments = parser.parse_args(words)
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        results = collect(arguments, Path(folder))
    dense = next(iter(results.values()))["dense_perplexity"]
    print(f"{arguments.model.name}: dense {dense:.3f}\n\n{tables(arguments, results)}")


if __name__ == "__main__":
    main()
