"""Peak anonymous memory of a run over the depth of the model, beside the bound that the README promises.

    python benchmarks/memory.py --blocks 4 8 16

Linux only: it watches /proc/PID/status of the process from outside.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open

from prune_cli.checkpoint import Checkpoint
from prune_cli.markdown import table

STATES = 3.5
FIXED = 1 << 30


def peak_of(command: list[str]) -> int:
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        anonymous = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in anonymous)])
        time.sleep(0.005)
    if process.returncode:
        sys.exit(f"{command} failed")
    return peak


def bound(model: Path, hidden: int) -> int:
    entries = Checkpoint.open(model).entries.values()
    block = sum(entry.count * 4 for entry in entries if entry.name.startswith("model.layers.0."))
    with safe_open(model / "tokens.safetensors", framework="pt") as stored:
        samples, length = stored.get_slice("input_ids").get_shape()
    return int(2 * block + STATES * samples * length * hidden * 4 + FIXED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--method", default="wanda")
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory() as folder:
            model, out = Path(folder) / "model", Path(folder) / "out"
            make = [sys.executable, str(Path(__file__).with_name("make_random_llama.py")), str(model)]
            subprocess.run([*make, "--blocks", str(blocks), "--hidden", str(arguments.hidden)], check=True)
            command = [sys.executable, "-m", "prune_cli", "prune", str(model), str(out), "-q", "-m", arguments.method]
            peak = peak_of([*command, "--calibration", str(model / "tokens.safetensors")])
            limit = bound(model, arguments.hidden)
            rows.append([str(blocks), f"{peak / 2**20:.0f}", f"{limit / 2**20:.0f}", f"{peak / limit:.2f}"])
    print(table(["blocks", "peak MiB", "bound MiB", "ratio"], rows))


if __name__ == "__main__":
    main()
