"""What a token adds to a model's cache of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prune_cli.model.architecture import find_blocks, setting

# What code raises on meta that looks into its tensors.
_NOT_ON_META = (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError, IndexError, KeyError)
_KEYS_AND_VALUES = (".k_proj", ".v_proj")
_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_attention_heads")
_TOKENS = 2
_HEAD_DIM = ("head_dim", "kv_channels", "d_kv")


def cache_bytes(model: Any) -> int | None:
    """Bytes a token in the dtype of `model`, which is on meta; None for a model that keeps no such cache.

    Told by a forward, or, where that looks into its tensors, by the layers that make keys and values, or by the config.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    try:
        return _by_forward(model)
    except _NOT_ON_META:
        return _by_maps(model) or _by_config(model)


@torch.no_grad()
def _by_forward(model: Any) -> int | None:
    """What is kept of one token in each layer's keys and values (…, tokens, width); states of a fixed size are not."""
    with torch.device("meta"):
        output = model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    cache = getattr(cache, "self_attention_cache", cache)  # that of decoders that could have an encoder beside them
    if cache is None:
        return None
    tensors = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
    of_tokens = [each for each in tensors if each is not None and each.ndim > 1 and each.shape[-2] == _TOKENS]
    return sum(each.nbytes for each in of_tokens) // _TOKENS


def _by_maps(model: Any) -> int | None:
    """What the linear layers that make keys and values give for a token."""
    _, blocks = find_blocks(model)
    made = [
        module.out_features
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(_KEYS_AND_VALUES)
    ]
    return sum(made) * model.dtype.itemsize if made else None


def _by_config(model: Any) -> int | None:
    """For every attention the heads that have keys and values times their width, or its latent state."""
    text = model.config.get_text_config()
    parts = [part for part in (text, setting(text, "attn_config")) if part is not None]
    queries, hidden = _first([text], ("num_attention_heads",)), _first([text], ("hidden_size",))
    heads, width = _first(parts, _HEADS), _first(parts, _HEAD_DIM)
    if width is None and queries and hidden:
        width = hidden // queries
    latent, rotated = (_first([text], (name,)) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    size = latent + (rotated or 0) if latent else 2 * (heads or 0) * (width or 0)
    # LongCat counts two attentions a block.
    layers = max(len(find_blocks(model)[1]), _first([text], ("num_hidden_layers",)) or 0)
    kinds = setting(text, "layer_types")
    if kinds:
        layers = sum("attention" in kind and not kind.startswith("linear") for kind in kinds)
    return layers * size * model.dtype.itemsize or None


def _first(parts: list[Any], names: tuple[str, ...]) -> int | None:
    """The first number that a config has under one of `names`."""
    for name in names:
        for part in parts:
            value = part.get(name) if isinstance(part, Mapping) else setting(part, name)
            if type(value) is int:
                return value
    return None
