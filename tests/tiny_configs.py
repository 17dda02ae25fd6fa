"""Configurations of three-block models, a few kilobytes each, one for every layout the tests cover."""

from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig

VOCABULARY = 128
BOS, EOS = 0, 1

# Wide enough that a layer of 32 inputs keeps the size of what it is given, so that logits depend on every block.
_SPREAD = 0.16
_WINDOW = 8

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    # Several defaults lie outside the small vocabulary, and a padding row would be all zeros.
    "pad_token_id": None,
    "initializer_range": _SPREAD,
}
_DENSE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {**_DENSE, "num_key_value_heads": 2}
# Heads whose widths do not add up to the hidden size, as in the published models of these kinds.
_WIDE_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 16}
_GEMMA: dict[str, Any] = {**_WIDE_HEADS, "query_pre_attn_scalar": 16, "sliding_window": _WINDOW}
_GPT: dict[str, Any] = {
    "n_embd": 32,
    "n_inner": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_OPT: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": _SPREAD,
    "dropout": 0.0,
}
_FALCON: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "llama-untied": ("llama", {**_GROUPED, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_WIDE_HEADS, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": _WINDOW}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2}),
    "phi3": ("phi3", {**_GROUPED, "original_max_position_embeddings": 64}),
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": 32}),
    # The layout of opt-350m: layers around the blocks, and norms after the sums.
    "opt-projected": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", _GPT),
    "gpt_neox": ("gpt_neox", {**_DENSE, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon-new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-old": ("falcon", {**_FALCON, "new_decoder_architecture": False}),
    "falcon-alibi": ("falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "granite": (
        "granite",
        {
            **_GROUPED,
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
            "logits_scaling": 2.0,
        },
    ),
    "cohere": ("cohere", {**_GROUPED, "logit_scale": 0.5}),
    "stablelm": ("stablelm", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "mamba": (
        "mamba",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "state_size": 8,
            # The default would give the step's layer two inputs, too few for a pattern of four or eight.
            "time_step_rank": 8,
        },
    ),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # The middle block is dense, the two beside it hold experts.
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_WIDE_HEADS,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
        },
    ),
    # An expert that all tokens see, with a gate of its own.
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_GROUPED,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "olmoe": ("olmoe", {**_GROUPED, "num_experts": 8, "num_experts_per_tok": 2}),
    # The first block is dense; the router has a sigmoid, a bias for choosing, and groups.
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_DENSE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    # Experts in one tensor, (in, out), gate and up interleaved, with biases.
    "gpt_oss": (
        "gpt_oss",
        {
            **_WIDE_HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": _WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    # Experts in one tensor, (out, in).
    "granitemoe": ("granitemoe", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # All experts see all tokens, most of them zeros.
    "llama4_text": (
        "llama4_text",
        {
            **_WIDE_HEADS,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 16,
        },
    ),
}

ARCHITECTURES: tuple[str, ...] = tuple(_KINDS)

_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
# Models whose blocks differ by rules on their numbers, for the tests of such rules alone.
_RULED: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("smollm3", {**_GROUPED, "use_sliding_window": True, "sliding_window": _WINDOW}),
    "lfm2": ("lfm2", _GROUPED),
    "falcon_h1": ("falcon_h1", {**_GROUPED, **_MAMBA, "mamba_d_ssm": 64}),
    "jamba": (
        "jamba",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 8},
    ),
    "minimax": ("minimax", {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_next": (
        "qwen3_next",
        {
            **_WIDE_HEADS,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}

# Models whose experts are computed in ways of their own, for the tests of experts.
_OWN_EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    # One below the other, the last layer (in, out).
    "dbrx": (
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
            "use_cache": True,
        },
    ),
    # Sorted by experts before they are multiplied; attention has experts too.
    "jetmoe": ("jetmoe", {**_GROUPED, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # Two of the six that a token can be sent to return what they get.
    "longcat_flash": (
        "longcat_flash",
        {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_layers": 2,
            "num_attention_heads": 4,
            "expert_ffn_hidden_size": 24,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "max_position_embeddings": 64,
        },
    ),
}


def tiny_config(architecture: str, **overrides: object) -> PreTrainedConfig:
    model_type, settings = {**_KINDS, **_RULED, **_OWN_EXPERTS}[architecture]
    return cast("PreTrainedConfig", AutoConfig.for_model(model_type, **{**_SHARED, **settings, **overrides}))
