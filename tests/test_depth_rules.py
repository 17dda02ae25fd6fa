"""Architectures whose configs tell blocks apart by a rule on their numbers: expressed exactly, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prune_cli.structured.depth.block_entries import BlockEntries
from tests.broken import change_config
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
        _assert_no_key_lies(out, RULES[kind])


def _assert_no_key_lies(out: Path, rules: dict[str, Any]) -> None:
    """Who reads the published keys alone learns of the same blocks as who reads the lists, or finds no key."""
    config = json.loads((out / "config.json").read_text())
    if rules.keys() & config.keys():
        by_rule = AutoConfig.for_model(**{key: value for key, value in config.items() if key not in LISTS}).to_dict()
        assert [by_rule.get(key) for key in LISTS] == [AutoConfig.for_model(**config).to_dict().get(k) for k in LISTS]


# Entries of a config with six blocks and one extra head, and what they are without the blocks 1 and 4.
ENTRIES: dict[str, tuple[Any, Any]] = {
    "layer_types": (list("abcdef"), list("acdf")),
    "layer_types of heads too": (list("abcdefH"), list("acdfH")),
    "hybrid_override_pattern": ("ME*-MEH", "M*-EH"),
    "moe_layers_enum": ("1,2,4,5,6", "1,3,4"),
    "mlp_only_layers": ([1, 5], [3]),
    "kda_layers": ([1, 2, 3, 5, 6], [1, 2, 4]),
    "kv_source_layers": ([0, 0, 2, 2, 2, 5], [0, 1, 1, 3]),
    "num_hash_layers": (3, 2),
    "per_layer_config": ({"0": "a", "1": "b", "5": "f"}, {"0": "a", "3": "f"}),
    "linear_attn_config": ({"full_attn_layers": [4], "head_dim": 6}, {"full_attn_layers": [3], "head_dim": 6}),
    "sparse_attention_config": ({"freq": [0, 1, 1, 0, 0, 1]}, {"freq": [0, 1, 0, 1]}),
    "num_attention_heads": (6, None),
    "rope_parameters": ({"mrope": [1] * 6}, None),
    "eos_token_id": ([1, 2, 3, 4, 5, 6], None),
}


@pytest.mark.parametrize("key", ENTRIES)
def test_every_way_to_speak_of_blocks_is_cut(key: str) -> None:
    value, expected = ENTRIES[key]
    assert BlockEntries(6, 1, [0, 2, 3, 5]).changed(key.partition(" ")[0], value) == expected


_V4 = {
    "vocab_size": 128, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16, "num_experts_per_tok": 2,
    "n_routed_experts": 4, "n_shared_experts": 1, "max_position_embeddings": 64, "sliding_window": 16, "o_groups": 2,
    "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "hc_mult": 2,
}  # fmt: skip
_GEMMA4 = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings", "hub", "expected"),
    [
        (
            "deepseek_v4",
            _V4,
            {
                "compress_ratios": [128, 128, 128, 4, 0],
                "num_hash_layers": 3,
                "layer_types": None,
                "mlp_layer_types": None,
            },
            {"compress_ratios": [128, 128, 4, 0], "num_hash_layers": 2, "num_nextn_predict_layers": 1},
        ),
        ("gemma4_text", _GEMMA4, {}, {"per_layer_config": {"0": {"head_dim": 16}, "2": {"head_dim": 16}}}),
    ],
)
def test_the_keys_of_the_hub_are_cut_too(
    kind: str, settings: dict[str, Any], hub: dict[str, Any], expected: Any, tmp_path: Path, command: RunCommand
) -> None:
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(model)
    change_config(model, **hub)
    which = "0" if kind == "gemma4_text" else "1"
    outcome = command("prune", model, tmp_path / "out", "-m", "depth", "-o", f"which={which}", "-o", "refit=none", "-q")
    assert outcome.code == 0, outcome.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    logits = load_plain(tmp_path / "out")(input_ids=token_ids(), use_cache=False).logits
    assert torch.equal(logits, logits_without_blocks(model, [int(which)], token_ids()))


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
