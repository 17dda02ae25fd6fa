#!/usr/bin/env bash
# What: transformers finds the multi-token-prediction head of DeepSeek-V3 only as layer 61, the released depth: with any other number of blocks, stored right behind them, it is called unexpected at load and generate(use_mtp=True) raises.
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), safetensors 0.8.0.
# Why: who removes blocks and renumbers the head, as num_nextn_predict_layers and runtimes want it, gets a checkpoint whose head transformers cannot use; the same for GLM-4-MoE (46 and 92).
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" -q --disable-pip-version-check install torch==2.13.0 'numpy<3' transformers==5.23.0 safetensors==0.8.0 accelerate
"$place/venv/bin/python" - "$place" <<'PY'
import sys
from pathlib import Path

import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=2,
    num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)


def checkpoint(folder, blocks):
    """A tiny model with a head in layers.BLOCKS: a block like the last one, and the projection of the head."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(DeepseekV3Config(num_hidden_layers=blocks, **SIZES)).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    last, own = f"model.layers.{blocks - 1}.", f"model.layers.{blocks}."
    head = {own + name.removeprefix(last): t.clone() for name, t in stored.items() if name.startswith(last)}
    for name, shape in (("enorm", (32,)), ("hnorm", (32,)), ("shared_head.norm", (32,)), ("eh_proj", (32, 64))):
        head[f"{own}{name}.weight"] = torch.full(shape, 0.5)
    save_file({**stored, **head}, folder / "model.safetensors", metadata={"format": "pt"})


seen = {}
for blocks in (61, 4):
    folder = Path(sys.argv[1]) / f"blocks-{blocks}"
    checkpoint(folder, blocks)
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    try:
        out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, use_mtp=True)
        how = "generates"
    except Exception as error:
        how = f"{type(error).__name__}: {str(error)[:90]}..."
    seen[blocks] = (len(told["unexpected_keys"]) > 0, how.partition(":")[0])
    print(f"{blocks} blocks, head in layers.{blocks}: {len(told['unexpected_keys'])} unexpected keys; use_mtp {how}")
same = seen == {61: (False, "generates"), 4: (True, "RuntimeError")}
print("as described" if same else "this has changed")
sys.exit(0 if same else 1)
PY
