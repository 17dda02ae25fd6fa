#!/usr/bin/env bash
# What: on a machine without an accelerator, `accelerate launch --num-processes 2` starts one process and says nothing of the other; and under torchrun PartialState() ignores RANK and WORLD_SIZE, so that is_main_process holds in every process: only PartialState(cpu=True) joins them.
# Versions: accelerate 1.15.0, torch 2.13.0 (CPU).
# Why: a pruner that shares its work by accelerate and was only tried on GPUs takes as long as alone here or, under torchrun, does the whole work once per process and writes one output folder from all of them at once.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" -q --disable-pip-version-check install torch==2.13.0 'numpy<3' accelerate==1.15.0
cat > "$place/ranks.py" <<'PY'
import os
import sys
from pathlib import Path

from accelerate import PartialState

state = PartialState(cpu=True) if sys.argv[2] == "cpu" else PartialState()
told = f"{state.num_processes} {state.is_main_process}"
Path(sys.argv[1], f"{sys.argv[2]}-{os.environ.get('RANK', 0)}").write_text(told)
PY
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
for how in default cpu; do
  "$place/venv/bin/torchrun" --nproc-per-node 2 "$place/ranks.py" "$place" "$how" 2>/dev/null
done
"$place/venv/bin/accelerate" launch --num-processes 2 "$place/ranks.py" "$place" launched 2>/dev/null
"$place/venv/bin/python" - "$place" <<'PY'
import sys
from pathlib import Path

import accelerate, torch

print(f"accelerate {accelerate.__version__}, torch {torch.__version__}")
told = {}
for name, how in {
    "default": "torchrun, PartialState()",
    "cpu": "torchrun, PartialState(cpu=True)",
    "launched": "accelerate launch --num-processes 2, PartialState()",
}.items():
    told[name] = [path.read_text() for path in sorted(Path(sys.argv[1]).glob(f"{name}-*"))]
    print(f"{how}: processes and is_main_process in each: {told[name]}")
same = told == {"default": ["1 True", "1 True"], "cpu": ["2 True", "2 False"], "launched": ["1 True"]}
print("as described" if same else "this has changed")
sys.exit(0 if same else 1)
PY
