"""How large a model is and what a token costs in it, told from the model on meta and its files' headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.model.architecture import find_blocks, model_on_meta
from prune_cli.model.roles import role_of
from prune_cli.report.types import Size

# The one dtype in which experts can be run on meta.
_ON_META = torch.bfloat16
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "num_experts_per_token", "top_k_experts")
# What code raises on meta that looks into its tensors.
_NOT_ON_META = (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError, IndexError, KeyError)


def size_of(
    config: Any, entries: Mapping[str, TensorEntry], nbytes: int, itemsize: int, trust_remote_code: bool
) -> Size:
    """The size of the model that `config` describes, stored as `entries`, with a cache of `itemsize` bytes a number."""
    model = model_on_meta(config, _ON_META, trust_remote_code)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # version 5.17 of transformers looks into a mask for sdpa, also on meta
    blocks_name, blocks = find_blocks(model)
    cache = _cache_bytes(model)
    return Size(
        parameters=sum(entry.count for entry in entries.values()),
        bytes=nbytes,
        blocks=len(blocks),
        kv_cache_bytes_per_token=None if cache is None else cache * itemsize // _ON_META.itemsize,
        macs_per_token=_macs(model, blocks_name),
    )


def _macs(model: Any, blocks_name: str) -> int:
    """Every weight of a linear map is used once per token; of the experts, those that a token is sent to."""
    total = 0.0
    for name, tensor in model.state_dict().items():
        role, _ = role_of(model, name, tensor.ndim, in_block=name.startswith(blocks_name + "."))
        if role in ("linear map", "output head", "router") and tensor.ndim == 2:
            total += tensor.numel()
        elif role == "expert" and tensor.ndim == 3:
            total += tensor.numel() * min(1.0, _top_k(model.config, tensor.shape[0]) / tensor.shape[0])
    return int(total)


def _top_k(config: Any, experts: int) -> int:
    text = config.get_text_config()
    found = [getattr(text, name) for name in _TOP_K if isinstance(getattr(text, name, None), int)]
    return found[0] if found else experts


def _cache_bytes(model: Any) -> int | None:
    """What the cache grows by from two to three tokens; None for a model that keeps none of that kind."""
    try:
        sizes = [_cache_size(model, tokens) for tokens in (2, 3)]
    except _NOT_ON_META:
        return _keys_and_values(model)
    return None if sizes[0] is None or sizes[1] is None else sizes[1] - sizes[0]


def _keys_and_values(model: Any) -> int | None:
    """What the maps that make keys and values give for a token."""
    _, blocks = find_blocks(model)
    made = [
        module.out_features
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and name.endswith((".k_proj", ".v_proj"))
    ]
    return sum(made) * _ON_META.itemsize if made else None


@torch.no_grad()
def _cache_size(model: Any, tokens: int) -> int | None:
    with torch.device("meta"):
        output = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return None
    tensors = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
