#!/usr/bin/env bash
# What: transformers loads an FP8 checkpoint with dequantize=True and dtype=float32 in two dtypes: what was packed in float32, all the rest in bfloat16; the forward raises.
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), safetensors 0.8.0.
# Why: who compares a pruned FP8 model with its dense one in float32, as on a CPU, gets an error inside a linear layer; model.float() after loading is needed.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" -q --disable-pip-version-check install torch==2.13.0 'numpy<3' transformers==5.23.0 safetensors==0.8.0 accelerate
"$place/venv/bin/python" - "$place/model" <<'PY'
import json, sys
from pathlib import Path

import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3Config

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = Path(sys.argv[1])
torch.manual_seed(0)
sizes = dict(hidden_size=128, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
config = Qwen3Config(vocab_size=64, num_hidden_layers=1, **sizes)
AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
packed = {}
for name, weight in load_file(folder / "model.safetensors").items():
    if "_proj" in name:
        scale = weight.float().abs().max() / 448
        packed[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scale.reshape(1, 1)
    else:
        packed[name] = weight
save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
text = json.loads((folder / "config.json").read_text())
text["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
(folder / "config.json").write_text(json.dumps(text))

seen = {}
for dtype in (torch.bfloat16, torch.float32):
    way = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=way).eval()
    found = sorted({str(parameter.dtype) for parameter in model.parameters()})
    try:
        model(torch.tensor([[1, 2, 3]]))
        ran = "runs"
    except RuntimeError as error:
        ran = f"raises: {error}"
    seen[dtype] = found, ran
    print(f"asked for {dtype}: parameters in {', '.join(found)}; the forward {ran}")
once = model.float()(torch.tensor([[1, 2, 3]])).logits.dtype
print(f"after model.float(): runs in {once}")
two = seen[torch.float32][0] == ["torch.bfloat16", "torch.float32"] and seen[torch.float32][1].startswith("raises")
sys.exit(0 if seen[torch.bfloat16] == (["torch.bfloat16"], "runs") and two and once == torch.float32 else 1)
PY
