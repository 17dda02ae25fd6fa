"""Wanda at 50 %: our wall time beside one plain forward pass plus a copy of the checkpoint, in one run.

    python benchmarks/make_random_llama.py /tmp/llama-162m
    python benchmarks/wanda_speed.py /tmp/llama-162m --peer-python /tmp/llmc/bin/python

Repeats are interleaved and the medians are compared; every contestant runs in a process of its own, with torch and
transformers imported before its clock starts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prune_cli.markdown import table

TARGET_FORWARD, TARGET_PEER = 1.25, 0.5
BATCH = 4

FORWARD = """
import json, sys, time, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model_folder, tokens, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
ids = load_file(tokens)["input_ids"]
with torch.no_grad():
    begun = time.monotonic()
    for part in ids.split(batch):
        model(input_ids=part, use_cache=False)
    print(json.dumps({"seconds": time.monotonic() - begun}))
"""

OURS = """
import json, sys, time, torch
import prune_cli, prune_cli.run
begun = time.monotonic()
report = prune_cli.prune(sys.argv[1], sys.argv[4], calibration=sys.argv[2], batch_size=int(sys.argv[3]))
print(json.dumps({"seconds": time.monotonic() - begun, "peak_host_bytes": report.peak_host_bytes}))
"""

# The incumbent's own entry point, in its own environment; its clock covers the run and the saving, not the loading.
PEER = """
import json, sys, time, torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
try:
    from llmcompressor.modifiers.pruning import WandaPruningModifier
except ImportError:
    from llmcompressor.modifiers.obcq import WandaPruningModifier
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
ids = load_file(sys.argv[2])["input_ids"]
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
begun = time.monotonic()
oneshot(model=model, dataset=data, num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
        recipe=WandaPruningModifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]))
model.save_pretrained(sys.argv[4])
print(json.dumps({"seconds": time.monotonic() - begun}))
"""


def run(python: str, code: str, model: Path, tokens: Path, out: Path) -> dict[str, float]:
    done = subprocess.run(
        [python, "-c", code, str(model), str(tokens), str(BATCH), str(out)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{python} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def copy(model: Path, out: Path) -> dict[str, float]:
    begun = time.monotonic()
    shutil.copytree(model, out)
    return {"seconds": time.monotonic() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=Path, help="default: tokens.safetensors in the model's folder")
    parser.add_argument("--peer-python", help="the Python of an environment with llm-compressor")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    tokens = arguments.tokens or arguments.model / "tokens.safetensors"
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
            scratch = Path(folder)
            rounds = {
                "plain forward": lambda s=scratch: run(sys.executable, FORWARD, arguments.model, tokens, s / "none"),
                "copy": lambda s=scratch: copy(arguments.model, s / "copy"),
                "prune-cli": lambda s=scratch: run(sys.executable, OURS, arguments.model, tokens, s / "ours"),
            }
            if arguments.peer_python:
                rounds["llm-compressor"] = lambda s=scratch: run(
                    arguments.peer_python, PEER, arguments.model, tokens, s / "peer"
                )
            for name, measure in rounds.items():
                seconds.setdefault(name, []).append(measure()["seconds"])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(table(["", "seconds (median)"], [[name, f"{value:.2f}"] for name, value in median.items()]))
    ratio = median["prune-cli"] / (median["plain forward"] + median["copy"])
    print(f"\nprune-cli / (plain forward + copy) = {ratio:.2f}, target at most {TARGET_FORWARD}")
    if arguments.peer_python:
        peer = median["prune-cli"] / median["llm-compressor"]
        print(f"prune-cli / llm-compressor = {peer:.2f}, target at most {TARGET_PEER}")


if __name__ == "__main__":
    main()
