#!/usr/bin/env bash
# What: a model that compressed-tensors 0.9.4 wrote as sparse-bitmask loads in transformers with freshly drawn weights, under a table of warnings and no error.
# Versions: written by compressed-tensors 0.9.4 with transformers 4.51.3; read by transformers 5.23.0 with compressed-tensors 0.20.0, torch 2.13.0 (CPU).
# Why: pruned models were published in this form in 2024 and 2025; whoever prunes, measures or converts one today works on noise.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/old"; python3 -m venv "$place/new"
"$place/old/bin/pip" -q --disable-pip-version-check install torch==2.13.0 'numpy<3' transformers==4.51.3 compressed-tensors==0.9.4
"$place/new/bin/pip" -q --disable-pip-version-check install torch==2.13.0 'numpy<3' transformers==5.23.0 compressed-tensors==0.20.0

"$place/old/bin/python" - "$place/model" <<'PY'
import sys

import compressed_tensors, torch, transformers
from compressed_tensors import CompressionFormat, ModelCompressor
from compressed_tensors.config import SparsityStructure
from compressed_tensors.config.sparse_bitmask import BitmaskConfig
from transformers import LlamaConfig, LlamaForCausalLM

print(f"written by compressed-tensors {compressed_tensors.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).to(torch.bfloat16).eval()
linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
for module in linears:
    module.weight.data[torch.rand(module.weight.shape) < 0.5] = 0
config = BitmaskConfig(
    format=CompressionFormat.sparse_bitmask.value, global_sparsity=0.5,
    sparsity_structure=SparsityStructure.UNSTRUCTURED.value, targets=["Linear"], ignore=["lm_head"],
)
compressor = ModelCompressor(sparsity_config=config)
ids = torch.arange(32)[None]
torch.save(model(ids).logits, sys.argv[1] + ".logits")
model.save_pretrained(sys.argv[1], state_dict=compressor.compress(model), safe_serialization=True)
compressor.update_config(sys.argv[1])
PY
"$place/new/bin/python" - "$place/model" <<'PY'
import json, sys
from pathlib import Path

import compressed_tensors, torch, transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM

print(f"read by transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}")
folder = Path(sys.argv[1])
print("sparsity_config:", json.loads((folder / "config.json").read_text())["quantization_config"]["sparsity_config"]["format"])
with safe_open(folder / "model.safetensors", "pt") as file:
    print("stored:", [name for name in file.keys() if "layers.0.mlp.up_proj" in name])
truth = torch.load(str(folder) + ".logits")
found = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval() for _ in range(2)]
weights = [model.model.layers[0].mlp.up_proj.weight for model in found]
zeros = [float((weight == 0).float().mean()) for weight in weights]
print(f"loaded twice without an error; zeros in up_proj: {zeros[0]:.2f} and {zeros[1]:.2f}, written: 0.50")
print(f"the two loads are equal: {torch.equal(*weights)}")
wrong = float((found[0](torch.arange(32)[None]).logits - truth).abs().max() / truth.abs().max())
print(f"largest difference of the logits: {wrong:.2f} of the largest logit")
sys.exit(0 if zeros == [0.0, 0.0] and not torch.equal(*weights) and wrong > 0.1 else 1)
PY
