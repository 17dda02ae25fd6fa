"""How large a model is and what a token costs in it, told from the model on meta and its files' headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.model.architecture import find_blocks, model_on_meta, setting
from prune_cli.model.roles import role_of
from prune_cli.report.types import Size
from prune_cli.structured.cache_size import cache_bytes

# The one dtype in which experts can be run on meta.
_ON_META = torch.bfloat16
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "num_experts_per_token", "top_k_experts")


def size_of(
    config: Any, entries: Mapping[str, TensorEntry], nbytes: int, itemsize: int, trust_remote_code: bool
) -> Size:
    """The size of the model that `config` describes, stored as `entries`, with a cache of `itemsize` bytes a number."""
    model = model_on_meta(config, _ON_META, trust_remote_code)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # version 5.17 of transformers looks into a mask for sdpa, also on meta
    blocks_name, blocks = find_blocks(model)
    cache = cache_bytes(model)
    return Size(
        parameters=sum(entry.count for entry in entries.values()),
        bytes=nbytes,
        blocks=len(blocks),
        kv_cache_bytes_per_token=None if cache is None else cache * itemsize // _ON_META.itemsize,
        macs_per_token=_macs(model, blocks_name),
    )


def _macs(model: Any, blocks_name: str) -> int:
    """Every weight of a linear layer is used once per token; of the experts, those that a token is sent to."""
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
    found = [setting(text, name) for name in _TOP_K]
    return next((count for count in found if isinstance(count, int)), experts)
