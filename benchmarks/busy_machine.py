"""Seconds of one `prune` run, quiet and beside a busy core, for both ways that threads can wait."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from watch import watch

_WAITING = ("PASSIVE", "ACTIVE")


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """As many endless loops, each a process of its own."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def seconds_of_a_run(model: str, options: list[str], policy: str) -> float:
    os.environ["OMP_WAIT_POLICY"] = policy
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        return watch([sys.executable, "-m", "prune_cli", "prune", model, str(out), "-q", *options]).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("options", nargs="*", help="of `prune`, after --; default: those of `make demo`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", type=int, default=1, help="cores that other processes keep busy")
    arguments = parser.parse_args()
    options = arguments.options or ["--method", "wanda", "--sparsity", "0.5", "--eval", "builtin"]
    taken: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        for policy in _WAITING:
            taken.setdefault(f"{policy} quiet", []).append(seconds_of_a_run(arguments.model, options, policy))
            with busy_cores(arguments.busy):
                taken.setdefault(f"{policy} busy", []).append(seconds_of_a_run(arguments.model, options, policy))
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    best_quiet = min(medians[f"{policy} quiet"] for policy in _WAITING)
    for name, median in medians.items():
        print(f"{name:14} {median:7.2f} s  {median / best_quiet:5.2f} x the quicker quiet run")
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
