"""What an output of a packed checkpoint is like: plain 16-bit weights, or packed as they were."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from prune_cli.checkpoint.layout import Layout, OutputTensor, changed_layout, same_layout
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.errors import RequestError
from prune_cli.packed.dequantised import Dequantised
from prune_cli.packed.detect import without_quantisation


def output_layout(source: Checkpoint) -> Layout:
    """Where the tensors of an output with the names and shapes of `source` lie: in its files, its codes in their place.

    Of a view by halves, the files hold the values.
    """
    if not isinstance(source, Dequantised):
        return same_layout(source) if source.shows_its_files else _copied(source)
    if source.half:
        return _copied(source)
    return same_layout(source.stored)


def _copied(source: Checkpoint) -> Layout:
    return changed_layout(source, {name: OutputTensor(name) for name in source.entries})


def output_bytes(source: Checkpoint) -> int:
    """About what such an output takes."""
    if isinstance(source, Dequantised) and source.half:
        return sum(entry.nbytes for entry in source.entries.values())
    return source.nbytes


def exact_values(source: Checkpoint) -> Checkpoint:
    """The checkpoint as it is, though an output by halves will round it."""
    return source.exact() if isinstance(source, Dequantised) and source.half else source


def as_asked(source: Checkpoint, packed: str | None, *, default: str) -> Checkpoint:
    """The view by which an output is made `packed` (keep, bf16, or the `default`).

    Raises RequestError where a plain checkpoint is to be kept packed or unpacked.
    """
    if not isinstance(source, Dequantised):
        if packed is not None:
            raise RequestError(
                f"--packed {packed} is for models in FP8, FP4 or INT4, and {source.folder} is plain: leave it out."
            )
        return source
    return source.as_half() if (packed or default) == "bf16" else source


def keeps_packed(source: Checkpoint) -> bool:
    """Whether an output of `source` holds codes and scales."""
    return isinstance(source, Dequantised) and not source.half


def describe(source: Checkpoint) -> str | None:
    """In words, how the input is packed and the output will be; None for a plain one."""
    if not isinstance(source, Dequantised):
        return None
    labels = " and ".join(sorted({weight.label for weight in source.weights.values()}))
    if source.half:
        return f"The input is packed ({labels}); the output is plain, 16 bits a weight (--packed bf16)."
    return f"The input is packed ({labels}), and so is the output, on the input's scales (--packed keep)."


def output_config(source: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config`, the input's config.json, for an output of other shapes."""
    halves = isinstance(source, Dequantised) and source.half
    return without_quantisation(config) if halves else copy.deepcopy(dict(config))


def config_of_output(source: Checkpoint) -> str | None:
    """The text of the output's config.json, None where it is the input's."""
    if not (isinstance(source, Dequantised) and source.half):
        return None
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    return json.dumps(without_quantisation(config), indent=2, ensure_ascii=False) + "\n"
