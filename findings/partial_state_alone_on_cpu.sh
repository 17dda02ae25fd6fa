#!/usr/bin/env bash
# What: under torchrun on a machine without an accelerator, accelerate's PartialState() ignores RANK and WORLD_SIZE: every process believes that it is the only one, and is_main_process holds in all of them; only PartialState(cpu=True) joins them.
# Versions: accelerate 1.15.0, torch 2.13.0 (CPU).
# Why: a pruner that writes and talks on the main process alone, and was only tried on GPUs, does the whole work once per process on a CPU machine and writes one output folder from all of them at once.
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
Path(sys.argv[1], f"{sys.argv[2]}-{os.environ['RANK']}").write_text(told)
PY
for how in default cpu; do
  CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 "$place/venv/bin/torchrun" --nproc-per-node 2 "$place/ranks.py" "$place" "$how" 2>/dev/null
done
"$place/venv/bin/python" - "$place" <<'PY'
import sys
from pathlib import Path

import accelerate, torch

print(f"accelerate {accelerate.__version__}, torch {torch.__version__}")
told = {how: [Path(sys.argv[1], f"{how}-{rank}").read_text() for rank in range(2)] for how in ("default", "cpu")}
for how, ranks in told.items():
    print(f"{'PartialState(cpu=True)' if how == 'cpu' else 'PartialState()'}: processes and is_main_process of rank 0, 1: {ranks}")
same = told == {"default": ["1 True", "1 True"], "cpu": ["2 True", "2 False"]}
print("as described" if same else "this has changed")
sys.exit(0 if same else 1)
PY
