"""forward.py MODEL TOKENS BATCH base|head: one plain forward pass in transformers, the model in memory before.

Prints one line of JSON with the seconds. `base` leaves the output head out, as calibration has no use for it.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(model_folder: str, tokens: str, batch: str, part: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    model = whole.base_model if part == "base" else whole
    ids = load_file(tokens)["input_ids"]
    # A few tokens bring mapped weights into memory, so that the pass itself reads no file.
    model(input_ids=ids[:1, :8], use_cache=False)
    begun = time.monotonic()
    for rows in ids.split(int(batch)):
        model(input_ids=rows, use_cache=False)
    print(json.dumps({"work": time.monotonic() - begun}))


if __name__ == "__main__":
    main(*sys.argv[1:])
