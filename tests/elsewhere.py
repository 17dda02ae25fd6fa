"""Run as a process of its own, where prune-cli cannot be imported: what plain transformers makes of output folders.

Reads {name: folder} from a file, and writes for each what was found and the logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

for package in ("prune_cli", "methods", "calibration", "tests"):
    assert package not in sys.modules
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]

TEXT = "def f(x): return x"


def look(folder: Path, ids: torch.Tensor, scratch: Path) -> tuple[dict[str, Any], torch.Tensor]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded[0].eval(), loaded[1]
    logits = model(input_ids=ids, use_cache=False).logits
    generated = model.generate(ids[:1, :8], max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.save_pretrained(scratch)
    again = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        "new_tokens": generated.shape[1] - 8,
        "same_after_saving_again": bool(torch.equal(again(input_ids=ids, use_cache=False).logits, logits)),
        "text_kept": tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT,
        "blocks": model.config.get_text_config().num_hidden_layers,
    }
    return found, logits


@torch.no_grad()
def main() -> None:
    jobs, tokens, results = map(Path, sys.argv[1:4])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ids = load_file(tokens)["input_ids"]
    found, logits = {}, {}
    for name, folder in json.loads(jobs.read_text()).items():
        found[name], logits[name] = look(Path(folder), ids, results.with_name(f"again-{name}"))
    save_file(logits, results.with_suffix(".safetensors"))
    results.write_text(json.dumps(found))


main()
