"""llm_compressor.py MODEL TOKENS BATCH OUT [METHOD [SPARSITY MASK]]: llm-compressor's oneshot, in its own environment.

METHOD is wanda or sparsegpt, MASK 0:0 (unstructured, 50 % by default) or 2:4.

Prints one line of JSON: the seconds of oneshot and of saving. Imports and loading the model are left out of both.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import time

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main(
    model_folder: str,
    tokens: str,
    batch: str,
    out: str,
    method: str = "wanda",
    sparsity: str = "0.5",
    mask: str = "0:0",
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = load_file(tokens)["input_ids"]
    batches = DataLoader([{"input_ids": row} for row in ids], batch_size=int(batch))  # pyright: ignore[reportArgumentType]
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    recipe = modifier(sparsity=float(sparsity), mask_structure=mask, targets=["Linear"], ignore=["re:.*lm_head"])
    begun = time.monotonic()
    oneshot(model=model, dataset=batches, recipe=recipe, num_calibration_samples=len(ids))
    pruned = time.monotonic()
    model.save_pretrained(out)
    print(json.dumps({"oneshot": pruned - begun, "saving": time.monotonic() - pruned}))


if __name__ == "__main__":
    main(*sys.argv[1:])
