"""What a token adds to the cache, told on meta or from the config, is what the cache grows by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prune_cli.structured.cache_size import cache_bytes

_BERT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_BERT, "num_key_value_heads": 2, "max_position_embeddings": 64}
# Of these no forward runs on meta but the first.
_KINDS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "rembert": {**_BERT, "input_embedding_size": 32, "output_embedding_size": 32, "is_decoder": True},
    "jetmoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "longcat_flash": {
        "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2, "num_attention_heads": 4,
        "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
        "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    },
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", _KINDS)
@torch.no_grad()
def test_it_is_what_the_cache_grows_by(kind: str) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=None, **_KINDS[kind]
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(config).eval()

    sizes = []
    for tokens in (3, 4):
        cache = getattr(model(input_ids=torch.full((1, tokens), 5), use_cache=True), "past_key_values", None)
        cache = getattr(cache, "self_attention_cache", cache)
        sizes.append(cache and sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    assert cache_bytes(on_meta) == (sizes[0] and sizes[1] - sizes[0])
