"""Configurations of three-block language models inside vision-language and audio-language models."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

from tests.tiny import tiny_tokenizer
from tests.tiny_configs import VOCABULARY

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.16,
}
_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [1, 1, 2]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 32,
}
_QWEN3 = {**_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_IDEFICS = {"vision_config": _SIGLIP, "text_config": {"model_type": "llama", **_TEXT}, "scale_factor": 2}
_LLAMA4_TEXT = {
    **_TEXT,
    "intermediate_size_mlp": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
}
_LLAMA4_VISION = {
    **_SIGLIP,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
    "intermediate_size": 64,
}
_GEMMA4 = {
    **_TEXT,
    "pad_token_id": 2,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
}
_AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8}

WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"text_config": {**_TEXT, "rope_parameters": _MROPE}, "vision_config": _QWEN},
    "qwen3_vl": {"text_config": {**_TEXT, "rope_parameters": _MROPE}, "vision_config": _QWEN3},
    "qwen3_vl_moe": {"text_config": {**_TEXT, **_EXPERTS, "rope_parameters": _MROPE}, "vision_config": _QWEN3},
    "qwen3_5": {"text_config": {**_TEXT, **_LINEAR_ATTENTION}, "vision_config": _QWEN3},
    "qwen3_5_moe": {
        "text_config": {**_TEXT, **_LINEAR_ATTENTION, **_EXPERTS, "shared_expert_intermediate_size": 16},
        "vision_config": _QWEN3,
    },
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {"text_config": _GEMMA4, "vision_config": {**_SIGLIP, "num_key_value_heads": 2, "head_dim": 8}},
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT},
        "vision_config": {"model_type": "pixtral", **_SIGLIP},
    },
    "llama4": {"text_config": _LLAMA4_TEXT, "vision_config": _LLAMA4_VISION},
    "internvl": {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": {**_SIGLIP, "image_size": [16, 16], "patch_size": [8, 8]},
    },
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_SIGLIP},
    },
    "glm4v": {
        "text_config": {**_TEXT, "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
        "vision_config": {**_QWEN, "image_size": 16},
    },
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "paligemma": {
        "text_config": {"model_type": "gemma", **_TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP, "projection_dim": 32},
        "projection_dim": 32,
    },
    "qwen2_audio": {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "audio_config": {"model_type": "qwen2_audio_encoder", **_AUDIO},
    },
}
_TOKENS = {"image_token_id": 120, "video_token_id": 121, "audio_token_id": 122, "image_token_index": 120}


def wrapper_config(kind: str) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **WRAPPERS[kind], **_TOKENS)


def save_wrapper(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, shards: bool = True) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cast("PreTrainedModel", AutoModelForMultimodalLM.from_config(wrapper_config(kind)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype != torch.float32:
        torch.nn.Module.to(model, dtype)  # the rotary table of Llama 4 is complex
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3 if shards else 2 * size)
    tiny_tokenizer().save_pretrained(folder)
    return folder
