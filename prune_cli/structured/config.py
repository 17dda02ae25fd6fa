"""config.json after blocks were removed: the count, every list with an entry per block, every list of block numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from prune_cli.checkpoint.source import Source
from prune_cli.errors import RequestError, one_line
from prune_cli.model.architecture import read_config
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.packed.output import output_config

_COUNT = "num_hidden_layers"
# Lists of block numbers; every other list with as many entries as there are blocks has one for each.
_NUMBERS = frozenset(
    {
        "attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "global_attention_blocks", "kv_source_layers",
        "local_layer_ids", "mlp_only_layers", "moe_layers", "ple_layer_ids", "rope_scaling_layers",
    }
)  # fmt: skip
# How many of the first blocks are of another kind.
_FIRST = frozenset({"first_k_dense_replace"})
_NOT_BY_BLOCK = ("architectures", "_token_id", "suppress_tokens", "section", "factor")


def config_without_blocks(source: Source, model: StreamedModel, kept: Sequence[int]) -> dict[str, Any]:
    """The input's config.json, changed where it speaks of blocks. Raises RequestError where the count is not found."""
    raw = output_config(model.checkpoint, read_config(source.folder))
    text, part = text_config(raw, model.config)
    blocks = len(model.blocks)
    names = {_COUNT, text.attribute_map.get(_COUNT, _COUNT)}
    if getattr(text, _COUNT, None) != blocks:
        raise RequestError(
            f"config.json counts {getattr(text, _COUNT, None)} layers, but the model has {blocks} blocks: an output "
            "with fewer cannot be described by this architecture's config."
        )
    for key in names & part.keys() or {text.attribute_map.get(_COUNT, _COUNT)}:
        part[key] = len(kept)
    for key, value in text.to_dict().items():
        if key in _FIRST and isinstance(value, int):
            changed = sum(block < value for block in kept)
        else:
            changed = _cut(key, value, blocks, kept)
        if changed is not None:
            part[key] = changed
    return raw


def text_config(raw: dict[str, Any], config: Any) -> tuple[Any, dict[str, Any]]:
    """The config of the language model and its part of `raw`, in which changes belong."""
    text, part = config.get_text_config(), raw
    for name in _path_to(config, text):
        if name in part:
            part = part[name]  # without it, as in the first Qwen2-VL, its keys are among those of the whole
    return text, part


def _path_to(config: Any, wanted: Any) -> list[str]:
    """The keys under which `wanted` lies in `config`."""
    if config is wanted:
        return []
    for name in type(config).sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and any(part is wanted for part in _parts(inner)):
            return [name, *_path_to(inner, wanted)]
    raise RequestError(f"{type(config).__name__} does not say where the config of its language model is.")


def _parts(config: Any) -> list[Any]:
    inner = [getattr(config, name, None) for name in type(config).sub_configs]
    return [config, *(part for each in inner if each is not None for part in _parts(each))]


def config_from(raw: dict[str, Any], model: StreamedModel) -> Any:
    """The config that transformers makes of `raw`; raises RequestError where it refuses it."""
    try:
        return type(model.config).from_dict(json.loads(json.dumps(raw), object_hook=_float))
    except Exception as error:  # whatever transformers' validators raise
        raise RequestError(
            f"This architecture's config cannot describe the smaller model ({one_line(error)}): choose other blocks."
        ) from error


def _float(item: dict[str, Any]) -> Any:
    """How transformers writes numbers that JSON has not, as infinity."""
    return float(item["__float__"]) if item.keys() == {"__float__"} else item


def _cut(key: str, value: Any, blocks: int, kept: Sequence[int]) -> list[Any] | None:
    """The list without the removed blocks; None for what does not speak of single blocks."""
    if not isinstance(value, list | tuple) or not value or key.endswith(_NOT_BY_BLOCK):
        return None
    if key in _NUMBERS and all(isinstance(item, int) for item in value):
        return [new for new, block in enumerate(kept) if block in value]
    return [value[block] for block in kept] if len(value) == blocks else None
