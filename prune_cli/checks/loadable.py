"""Whether a folder loads in plain transformers, tried in a process of its own that knows nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

_PROGRAM = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
)

folder, trust = sys.argv[1], sys.argv[2] == "trust"
named = (AutoConfig.from_pretrained(folder, trust_remote_code=trust).architectures or [None])[0]
causal, wrapped = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()
auto = AutoModelForMultimodalLM if named in wrapped and named not in causal else AutoModelForCausalLM
model, told = auto.from_pretrained(folder, output_loading_info=True, trust_remote_code=trust)
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
    names = sorted(map(str, told.get(kind, ())))
    if names:
        sys.exit(f"loading reports {kind.replace('_', ' ')}: {names[0]} ({len(names)} in all)")
first = model.config.get_text_config().bos_token_id
ids = torch.tensor([[first if isinstance(first, int) else 0, 0]])
out = model.eval().generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
if out.shape != (1, 6):
    sys.exit(f"generate gave the shape {tuple(out.shape)} where (1, 6) was asked for")
"""


def load_failure(folder: Path, *, trust_remote_code: bool) -> str:
    """Empty if the model in `folder` loads with nothing missing or left over, and generates; else what went wrong."""
    trust = "trust" if trust_remote_code else "no"
    with tempfile.TemporaryDirectory() as elsewhere:
        # -I: neither the working folder nor PYTHONPATH can bring our package, or another transformers, into it.
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, str(folder), trust], cwd=elsewhere, capture_output=True, text=True
        )
    if done.returncode == 0:
        return ""
    if _needs_this_package(folder):
        return (
            "does not load by itself: it needs import prune_cli first (prune-cli convert --format dense makes it plain)"
        )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"does not load: {lines[-1] if lines else f'the process ended with {done.returncode}'}"


def _needs_this_package(folder: Path) -> bool:
    """Whether config.json names a way of storing weights that is ours."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    return str(stored.get("quant_method", "")).startswith("prune-cli")
