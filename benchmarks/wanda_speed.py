"""Wanda at 50 %: our seconds beside a plain forward pass plus a copy of the checkpoint, and beside llm-compressor.

    python benchmarks/make_random_llama.py /tmp/llama
    python benchmarks/wanda_speed.py /tmp/llama /tmp/llama/tokens.safetensors --llm-compressor /tmp/llmc/bin/python

Repeats are interleaved, medians are compared, every contestant runs in a process of its own. Linux, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from masks import Agreement, compare_masks
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from watch import Watched, watch

from prune_cli.engine.open_model import pick_batch_size

CONTESTANTS = Path(__file__).parent / "contestants"
TARGET_FORWARD, TARGET_PEER, TARGET_MASKS = 1.25, 0.5, 0.999

BASE, HEAD, COPY = "plain forward, no head", "plain forward, with head", "copy of the checkpoint"
API, COMMAND, PEER = "prune-cli, Python API", "prune-cli, command", "llm-compressor"


@dataclass(frozen=True)
class Sample:
    """One run of one contestant. `work` leaves out starting Python, imports and, where noted, loading the model."""

    process: float
    work: float
    peak_bytes: int
    parts: dict[str, float]


@dataclass(frozen=True)
class Ratio:
    of: str
    value: float
    target: float | None


@dataclass
class Bench:
    """The model, the tokens and the folder for outputs; `run` measures one contestant."""

    model: Path
    tokens: Path
    batch: int
    scratch: Path
    peer_python: str | None
    peer_batch: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def contestants(self) -> dict[str, Callable[[Path], Watched]]:
        """How to run each; the argument is the folder that it may write."""
        rounds: dict[str, Callable[[Path], Watched]] = {
            BASE: lambda _: self._script(sys.executable, "forward.py", self.batch, "base"),
            HEAD: lambda _: self._script(sys.executable, "forward.py", self.batch, "head"),
            COPY: lambda out: watch(["cp", "-r", "--reflink=never", str(self.model), str(out)]),
            API: lambda out: self._script(sys.executable, "ours.py", self.batch, str(out)),
            COMMAND: lambda out: self.command(out),
        }
        if self.peer_python is not None:
            python = self.peer_python
            rounds[PEER] = lambda out: self._script(python, "llm_compressor.py", self.peer_batch, str(out))
        return rounds

    def command(self, out: Path, *options: str) -> Watched:
        prune = [sys.executable, "-m", "prune_cli", "prune", str(self.model), str(out), "-m", "wanda", "-s", "0.5"]
        return watch([*prune, "--calibration", str(self.tokens), "--device", "cpu", "-q", *options])

    def _script(self, python: str, name: str, batch: int, last: str) -> Watched:
        return watch([python, str(CONTESTANTS / name), str(self.model), str(self.tokens), str(batch), last])

    def round(self, first: int) -> None:
        """Every contestant once, beginning with another one each time, so that no order favours anyone."""
        rounds = list(self.contestants().items())
        turn = first % len(rounds)
        for name, run in [*rounds[turn:], *rounds[:turn]]:
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                os.sync()  # nobody waits for what another has left to write
                self.samples.setdefault(name, []).append(sample_of(run(Path(folder) / "out")))

    def masks(self) -> Agreement | None:
        """Our masks of the authors' two-pass protocol, which is llm-compressor's too, beside its own."""
        if self.peer_python is None:
            return None
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            ours, peer = Path(folder) / "ours", Path(folder) / "peer"
            self.command(ours, "--calibrate-by", "block")
            self._script(self.peer_python, "llm_compressor.py", self.peer_batch, str(peer))
            return compare_masks(ours, peer)


def sample_of(watched: Watched) -> Sample:
    """A contestant's last line of output tells its own parts; without one, the whole process is the work."""
    lines = watched.stdout.strip().splitlines()
    parts: dict[str, float] = json.loads(lines[-1]) if lines else {}
    return Sample(watched.seconds, sum(parts.values()) if parts else watched.seconds, watched.peak_bytes, parts)


def ratios_of(samples: dict[str, list[Sample]]) -> list[Ratio]:
    work = {name: median(sample.work for sample in taken) for name, taken in samples.items()}
    process = {name: median(sample.process for sample in taken) for name, taken in samples.items()}
    plain = work[BASE] + work[COPY]
    ratios = [
        Ratio("work / (forward without head + copy)", work[API] / plain, TARGET_FORWARD),
        Ratio("work / (forward with head + copy)", work[API] / (work[HEAD] + work[COPY]), TARGET_FORWARD),
        Ratio("whole command / (forward without head + copy)", process[COMMAND] / plain, None),
    ]
    if PEER in samples:
        ratios.append(Ratio("work / llm-compressor's oneshot and saving", work[API] / work[PEER], TARGET_PEER))
        ratios.append(Ratio("whole command / llm-compressor's process", process[COMMAND] / process[PEER], TARGET_PEER))
    return ratios


def show(console: Console, bench: Bench, ratios: list[Ratio], agreement: Agreement | None) -> None:
    table = Table("", "work s", "from", "to", "process s", "peak MiB", title="medians")
    for name, taken in bench.samples.items():
        work = [sample.work for sample in taken]
        process, peak = median(sample.process for sample in taken), max(sample.peak_bytes for sample in taken)
        figures = [median(work), min(work), max(work), process]
        table.add_row(name, *(f"{value:.2f}" for value in figures), f"{peak / 2**20:.0f}")
    console.print(table)
    for ratio in ratios:
        console.print(f"prune-cli: {ratio.of} = {ratio.value:.3f}{verdict(ratio)}")
    if agreement is not None:
        met = "met" if agreement.share > TARGET_MASKS else "MISSED"
        console.print(
            f"masks: {100 * agreement.share:.4f} % of {agreement.weights:,} weights agree with llm-compressor "
            f"(worst tensor {agreement.worst}: {100 * agreement.worst_share:.4f} %); "
            f"target above {100 * TARGET_MASKS:g} %: {met}"
        )


def verdict(ratio: Ratio) -> str:
    if ratio.target is None:
        return ""
    return f", target at most {ratio.target:g}: {'met' if ratio.value <= ratio.target else 'MISSED'}"


def as_json(bench: Bench, ratios: list[Ratio], agreement: Agreement | None, load: float) -> dict[str, Any]:
    return {
        "model": str(bench.model),
        "tokens": str(bench.tokens),
        "batch_size": bench.batch,
        "threads": torch.get_num_threads(),
        "load_before": load,
        "samples": {name: [asdict(sample) for sample in taken] for name, taken in bench.samples.items()},
        "ratios": [asdict(ratio) for ratio in ratios],
        "masks": None if agreement is None else asdict(agreement),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors with input_ids (samples, length)")
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="the Python of an environment with llm-compressor")
    parser.add_argument("--llm-compressor-batch-size", type=int, default=1, help="its own default is 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where outputs go; default: beside the model, on the same disk")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    with safe_open(arguments.tokens, framework="pt") as stored:
        length = stored.get_slice("input_ids").get_shape()[1]
    bench = Bench(
        model=arguments.model,
        tokens=arguments.tokens,
        batch=pick_batch_size("auto", torch.device("cpu"), length),
        scratch=arguments.scratch or arguments.model.resolve().parent,
        peer_python=arguments.llm_compressor,
        peer_batch=arguments.llm_compressor_batch_size,
    )
    load = os.getloadavg()[0]
    for repeat in range(arguments.repeats):
        print(f"repeat {repeat + 1} of {arguments.repeats}", file=sys.stderr)
        bench.round(first=repeat)
    agreement, ratios = bench.masks(), ratios_of(bench.samples)
    if arguments.json:
        print(json.dumps(as_json(bench, ratios, agreement, load), indent=2))
    else:
        print(f"batches of {bench.batch} x {length} tokens, load before {load:.2f}")
        show(Console(width=None if sys.stdout.isatty() else 120), bench, ratios, agreement)


if __name__ == "__main__":
    main()
