"""Architectures whose configs tell blocks apart by a rule on their numbers: expressed exactly, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import RunCommand, token_ids
from tests.round_trips import logits_without_blocks
from tests.tiny import load_plain, save_tiny

LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "_sliding_window_pattern")
# Four blocks each.
RULES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 2},
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "qwen3_next": {"full_attention_interval": 2},
    "gemma3_text": {"sliding_window_pattern": 2},
    "smollm3": {"no_rope_layer_interval": 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "falcon_h1": {},
    "minimax": {},
}
# Removals that the config cannot say, and why.
REFUSED = {
    ("qwen3_moe", "1"): "by their numbers (decoder_sparse_step=2)",
    ("jamba", "1"): "by their numbers (expert_layer_period=2, attn_layer_period=2)",
    ("minimax", "1"): "has num_hidden_layers = 4, but there it would have 3",
    ("minimax", "1-2"): "has num_hidden_layers = 4, but there it would have 2",
}


def _model(kind: str, folder: Path) -> Path:
    """With a config as they are published: the rule, and none of the lists that follow from it."""
    save_tiny(folder, kind, shards=False, tokenizer=False, num_hidden_layers=4, **RULES[kind])
    raw = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in raw.items() if key not in LISTS}
    (folder / "config.json").write_text(json.dumps({**kept, **RULES[kind]}))
    return folder


@pytest.mark.filterwarnings("ignore")  # mamba layers say that they run without their kernels
@pytest.mark.parametrize("kind", RULES)
@torch.no_grad()
def test_a_rule_on_numbers_is_expressed_exactly_or_refused(kind: str, tmp_path: Path, command: RunCommand) -> None:
    model = _model(kind, tmp_path / "model")
    for which, gone in (("1", [1]), ("1-2", [1, 2])):
        out = tmp_path / which
        outcome = command("prune", model, out, "-m", "depth", "-o", f"which={which}", "-o", "refit=none", "-q")
        if (kind, which) in REFUSED:
            assert outcome.code == 2
            assert REFUSED[kind, which] in " ".join(outcome.stderr.split())
            continue
        assert outcome.code == 0, outcome.stderr
        logits = load_plain(out)(input_ids=token_ids(), use_cache=False).logits
        assert torch.equal(logits, logits_without_blocks(model, gone, token_ids()))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"block_auto_adjust_ff_dim": True, "block_multiple_of": 16}, "makes the real size from this one and others"),
        ({"block_auto_adjust_ff_dim": True, "block_multiple_of": 64}, "the real number follows from other settings"),
        ({"block_auto_adjust_ff_dim": False, "block_ff_dim": 96}, "would have the shape [96, 32]"),
    ],
)
def test_a_width_that_the_config_does_not_decide_is_refused(
    settings: dict[str, Any], told: str, tmp_path: Path, command: RunCommand
) -> None:
    """LFM2 rounds the width of its MLPs, or takes it from a key that transformers forgets."""
    model = save_tiny(tmp_path / "model", "lfm2", shards=False, tokenizer=False, intermediate_size=96, **settings)
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, **settings}))
    outcome = command("prune", model, tmp_path / "out", "-m", "width", "-o", "score=magnitude", "-o", "refit=none")
    assert outcome.code == 2
    assert told in " ".join(outcome.stderr.split())
