"""Seconds of one `prune` run by two processes with a thread each, as a ratio of one process with two threads.

    python benchmarks/make_random_llama.py /tmp/llama
    python benchmarks/processes.py /tmp/llama /tmp/llama/tokens.safetensors

Whole processes, start to end; the same tokens and batches. The machine must be quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from watch import watch

_METHODS = {"wanda": ["--method", "wanda"], "best": ["--preset", "best"]}


def seconds_of_a_run(arguments: argparse.Namespace, options: list[str], processes: int) -> float:
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads // processes)
    devices = [] if processes == 1 else ["--devices", ",".join(["cpu"] * processes)]
    with tempfile.TemporaryDirectory() as folder:
        run = ["prune", arguments.model, str(Path(folder) / "out"), "--calibration", arguments.tokens, "-q", *options]
        return watch([sys.executable, "-m", "prune_cli", *run, *devices]).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="in all; so many processes are compared with one")
    parser.add_argument("--methods", nargs="+", choices=list(_METHODS), default=list(_METHODS))
    arguments = parser.parse_args()
    taken: dict[str, dict[int, list[float]]] = {}
    for _ in range(arguments.repeats):
        for method in arguments.methods:
            for processes in (1, arguments.threads):
                seconds = seconds_of_a_run(arguments, _METHODS[method], processes)
                taken.setdefault(method, {}).setdefault(processes, []).append(seconds)
    for method, by_count in taken.items():
        one, several = (statistics.median(by_count[count]) for count in (1, arguments.threads))
        print(
            f"{method:6} 1 process {one:7.2f} s, {arguments.threads} processes {several:7.2f} s: {several / one:.2f} x"
        )
    print(json.dumps({"load": os.getloadavg(), "seconds": taken}))


if __name__ == "__main__":
    main()
