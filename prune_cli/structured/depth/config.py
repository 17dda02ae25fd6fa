"""config.json after blocks were removed: what transformers keeps of it, and what it only reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from prune_cli.checkpoint.config_file import read_config
from prune_cli.checkpoint.source import Source
from prune_cli.errors import RequestError
from prune_cli.model.extra_heads import counted_heads
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.packed.output import output_config
from prune_cli.structured.config import text_config
from prune_cli.structured.depth.block_entries import BlockEntries
from prune_cli.structured.depth.stale_keys import StaleKeys

_COUNT = "num_hidden_layers"


def config_without_blocks(
    source: Source, model: StreamedModel, kept: Sequence[int], *, drops_heads: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The input's config.json, changed where it speaks of blocks, and the keys that had to be taken out of it.

    Raises RequestError where the count is not found, or the config cannot describe the output.
    """
    raw = output_config(model.checkpoint, read_config(source.folder))
    before = copy.deepcopy(raw)
    text, part = text_config(raw, model.config)
    blocks = len(model.blocks)
    names = {_COUNT, text.attribute_map.get(_COUNT, _COUNT)}
    if getattr(text, _COUNT, None) != blocks:
        raise RequestError(
            f"config.json counts {getattr(text, _COUNT, None)} layers, but the model has {blocks} blocks: an output "
            "with fewer cannot be described by this architecture's config."
        )
    known, entries = text.to_dict(), BlockEntries(blocks, counted_heads(model.config.to_dict()), kept, drops_heads)
    own = {key: value for key, value in part.items() if key not in type(model.config).sub_configs}
    changed = {key: entries.changed(key, value) for key, value in {**known, **own}.items()}
    part |= {key: value for key, value in changed.items() if value is not None}
    part |= dict.fromkeys(names & part.keys() or {text.attribute_map.get(_COUNT, _COUNT)}, len(kept))
    lists = {key for key, value in known.items() if isinstance(value, list | dict) and changed[key] is not None}
    return raw, StaleKeys(model, entries, frozenset(lists), frozenset(names)).mend(before, raw)
