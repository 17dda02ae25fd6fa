"""The model that the new config.json describes, built on meta and held against what is to be written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prune_cli.errors import RequestError
from prune_cli.model.architecture import find_blocks, model_on_meta
from prune_cli.model.moe import drop_unread
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.structured.plan import StructuredPlan

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_IGNORED = frozenset({"training", "config"})
# GPT-2's option divides attention scores by the block's number plus one.
_COMPUTES_WITH_NUMBER = "scale_attn_by_inverse_layer_idx"

# Settings from which the kind of a block follows by its number.
_RULES = re.compile("_(step|freq|period|interval|offset|start_index|end_index|pattern)$|^first_k_")


def rebuild(source: StreamedModel, config: Any, change: StructuredPlan, *, trust_remote_code: bool) -> nn.Module:
    """The output's model on meta. Raises RequestError with the reason where it is not what `change` says.

    Compared with the input's model: names and shapes of all weights, and of every kept block the classes of its
    modules and their plain attributes (kinds of attention, windows, scales, ...).
    """
    model = model_on_meta(config, source.dtype, trust_remote_code)
    if source.without_unread:
        drop_unread(model)
    name, blocks = find_blocks(model)
    if name != source.blocks_name or len(blocks) != len(change.blocks):
        raise _cannot(f"the model rebuilt from it has {len(blocks)} blocks, expected {len(change.blocks)}", config)
    compare_shapes(source, model, change, config)
    for new, (old, block) in enumerate(zip(change.blocks, blocks, strict=True)):
        differs = _difference(source.blocks[old], old, block, new, change.narrowed)
        if differs is not None:
            raise _cannot(differs, config)
    return model


def _cannot(reason: str, config: Any) -> RequestError:
    rules = [f"{key}={value}" for key, value in config.get_text_config().to_dict().items() if _is_rule(key, value)]
    by_number = ""
    if rules:
        by_number = (
            f" It tells blocks apart by their numbers ({', '.join(rules)}): the last blocks, or as many in a row as "
            "the rule is long, may go."
        )
    return RequestError(f"This architecture's config cannot describe the smaller model: {reason}.{by_number}")


def _is_rule(key: str, value: Any) -> bool:
    return type(value) is int and value > 1 and _RULES.search(key) is not None


def compare_shapes(source: StreamedModel, model: nn.Module, change: StructuredPlan, config: Any) -> None:
    """Raise RequestError where `model`, built from `config`, has other weights than the output will hold."""
    expected = _expected(source, change)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise _cannot(
                f"{name} would have the shape {_told(found.get(name))} in the model rebuilt from it, but "
                f"{_told(expected.get(name))} in the output",
                config,
            )


def _told(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _expected(source: StreamedModel, change: StructuredPlan) -> Mapping[str, tuple[int, ...]]:
    """Weights of the output's model by their new names."""
    number = {old: new for new, old in enumerate(change.blocks)}
    prefix = source.blocks_name + "."
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in source.model.state_dict().items():
        shape = change.shapes.get(name, tuple(tensor.shape))
        if not name.startswith(prefix):
            expected[name] = shape
            continue
        old, _, rest = name[len(prefix) :].partition(".")
        if int(old) in number:
            expected[f"{prefix}{number[int(old)]}.{rest}"] = shape
    return expected


def _difference(before: nn.Module, old: int, after: nn.Module, new: int, narrowed: frozenset[str]) -> str | None:
    """What makes `after`, the output's block `new`, another one than `before`."""
    modules = dict(after.named_modules())
    for path, module in before.named_modules():
        where = f"block {old}{'.' + path if path else ''}"
        other = modules.get(path)
        if type(other) is not type(module):
            return f"{where} is a {type(module).__name__}, but there it would be a {type(other).__name__}"
        for key, value in vars(module).items():
            if key.startswith("_") or key in _IGNORED or key in narrowed or not _is_plain(value):
                continue
            there = vars(other).get(key)
            if value != there and not _is_number_of_block(key, value, old, there, new):
                return f"{where} has {key} = {value!r}, but there it would have {there!r}"
        if old != new and getattr(module, _COMPUTES_WITH_NUMBER, False):
            return f"{where} computes with its own number ({_COMPUTES_WITH_NUMBER}), which would change"
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _is_number_of_block(key: str, value: Any, old: int, there: Any, new: int) -> bool:
    """Blocks know where they stand (`layer_idx`): the same distance from both numbers is the same thing."""
    if key.startswith("num_"):
        return False  # a count, as of all blocks
    return type(value) is int and type(there) is int and value - old == there - new
