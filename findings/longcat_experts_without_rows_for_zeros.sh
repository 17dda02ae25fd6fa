#!/usr/bin/env bash
# What: transformers builds LongCat-Flash's gate_up_proj with rows for the zero-computation experts too, which have no weights: its own save writes them as experts, and a checkpoint that holds the real experts alone, as LongCat's does, is refused for a size mismatch.
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), safetensors 0.8.0.
# Why: who prunes experts of LongCat-Flash reads and writes names up to n_routed_experts; save_pretrained of the loaded model gives other tensors than were published, and the published ones do not load at all.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" -q --disable-pip-version-check install torch==2.13.0 'numpy<3' transformers==5.23.0 safetensors==0.8.0 accelerate
"$place/venv/bin/python" - "$place/model" <<'PY'
import sys
from pathlib import Path

import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
transformers.utils.logging.disable_progress_bar()
REAL, ZERO = 6, 3
config = AutoConfig.for_model(
    "longcat_flash", vocab_size=128, hidden_size=32, num_layers=2, num_attention_heads=4, num_key_value_heads=4,
    ffn_hidden_size=48, expert_ffn_hidden_size=24, n_routed_experts=REAL, zero_expert_num=ZERO, moe_topk=3,
    q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, head_dim=4,
)
folder = Path(sys.argv[1])
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config).save_pretrained(folder)
stored = load_file(folder / "model.safetensors")


def saved(part):
    prefix = "model.layers.0.mlp.experts."
    return sorted({int(name.removeprefix(prefix).split(".")[0]) for name in stored if name.startswith(prefix) and part in name})


rows = {part: len(saved(part)) for part in ("gate_proj", "up_proj", "down_proj")}
print(f"{REAL} experts and {ZERO} zero experts: saved are {rows}")
zero = tuple(f".experts.{number}." for number in range(REAL, REAL + ZERO))
kept = {name: tensor for name, tensor in stored.items() if not any(part in name for part in zero)}
save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
try:
    AutoModelForCausalLM.from_pretrained(folder)
    ended = "loads"
except Exception as error:
    ended = type(error).__name__
model, told = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
names = sorted(key[0] if isinstance(key, tuple) else key for key in told["mismatched_keys"])
print(f"with the {REAL} real experts alone: {ended}; mismatched {names}")
same = rows == {"gate_proj": REAL + ZERO, "up_proj": REAL + ZERO, "down_proj": REAL} and ended == "RuntimeError" and names
print("as described" if same else "this has changed")
sys.exit(0 if same else 1)
PY
