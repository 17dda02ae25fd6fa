"""Which tensors shrink together when a block loses channels or heads, told by the config instead of by architecture.

The model is built again on meta with a smaller size in its config; the tensors whose shapes differ then are the ones
that carry the units, and the axis that differs says how. In what order a fused tensor holds its parts (q, k and v; gate
and up) is tried out: `removal.py` compares the smaller block with the one whose units are zeroed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prune_cli.engine.open_model import OpenModel
from prune_cli.errors import RequestError, one_line
from prune_cli.model.architecture import model_on_meta, setting
from prune_cli.model.shape_overrides import sizes_entry
from prune_cli.structured.units import WORDS, CoupledGroup, GroupName, UnitLayout

_OTHER: dict[GroupName, GroupName] = {"mlp": "heads", "heads": "mlp", "experts": "heads", "shared": "heads"}
WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_MOST_LAYOUTS = 64


def unit_count(opened: OpenModel, group: GroupName) -> int:
    """Channels a block, or heads (whole key-value groups); raises RequestError where the config names none."""
    config = opened.model.config.get_text_config()
    if group == "mlp":
        return _width(opened, config)[1]
    heads, groups = _head_counts(opened, config)
    return groups if groups > 1 else heads


def find_group(opened: OpenModel, group: GroupName, keep: int) -> Iterator[CoupledGroup]:
    """All ways in which the tensors may hold the units, the likeliest first; raises RequestError, with the reason."""
    config = opened.model.config.get_text_config()
    changes = _mlp_changes(opened, config, keep) if group == "mlp" else _head_changes(opened, config, keep)
    return group_choices(opened, group, (unit_count(opened, group), keep), changes, changed_shapes(opened, changes))


def group_choices(
    opened: OpenModel,
    group: GroupName,
    counts: tuple[int, int],
    changes: Mapping[str, Any],
    changed: Mapping[str, tuple[int, ...]],
) -> Iterator[CoupledGroup]:
    """As `find_group`, for units of which `counts` are there and stay: `changed` are the parameters that shrink."""
    units, keep = counts
    smaller: dict[str, tuple[int, int, int]] = {}
    named = {info.parameter: name for name, info in opened.model.tensor_map.items()}
    for parameter, shape in changed.items():
        _check_place(opened, named.get(parameter), parameter, group)
        smaller[named[parameter]] = _shrinks(parameter, opened.model.shape_of(parameter), shape, units, keep, group)
    consumers = _consumers(opened, smaller, group)
    blocks = {name: opened.model.tensor_map[name].block or 0 for name in smaller}
    width = _one_width(smaller, consumers, group)
    choices = [_layouts(cut, width, group) for cut in smaller.values()]
    # Tensors of one kind hold their units alike: a layout is chosen for all of them at once.
    kinds = list(
        dict.fromkeys((cut[1:], tuple(layouts)) for cut, layouts in zip(smaller.values(), choices, strict=True))
    )
    options = [layouts for _, layouts in kinds]
    for chosen in itertools.islice(itertools.product(*options), _MOST_LAYOUTS):
        layout_of = dict(zip([kind for kind, _ in kinds], chosen, strict=True))
        slices = {name: UnitLayout(cut[0], layout_of[cut[1:]], cut[2]) for name, cut in smaller.items()}
        yield CoupledGroup(group, units, keep, width, consumers, slices, blocks, changes)


def _key(config: Any, standard: str) -> str:
    return (getattr(config, "attribute_map", None) or {}).get(standard, standard)


def _width(opened: OpenModel, config: Any) -> tuple[str, int]:
    for key in WIDTH_KEYS:
        value = setting(config, key)
        if value is not None or key in config.to_dict():
            return key, value if isinstance(value, int) else 4 * opened.model.hidden_size
    raise RequestError(
        f"The config of {type(opened.model.model).__name__} has no key for the MLP's width, which cannot change then: "
        "use -o parts=heads or --method depth."
    )


def width_key(opened: OpenModel) -> str:
    """The key of the MLP's width; raises RequestError where the config has none."""
    return _width(opened, opened.model.config.get_text_config())[0]


def _mlp_changes(opened: OpenModel, config: Any, keep: int) -> dict[str, Any]:
    return {_width(opened, config)[0]: keep}


def _head_counts(opened: OpenModel, config: Any) -> tuple[int, int]:
    heads = setting(config, "num_attention_heads")
    if not isinstance(heads, int):
        raise RequestError(
            f"The config of {type(opened.model.model).__name__} has no number of attention heads for all blocks: use "
            "-o parts=mlp."
        )
    for key in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(setting(config, key), int):
            return heads, setting(config, key) if not getattr(config, "multi_query", False) else 1
    return heads, heads


def _head_changes(opened: OpenModel, config: Any, keep: int) -> dict[str, Any]:
    heads, groups = _head_counts(opened, config)
    head_dim = setting(config, "head_dim") or opened.model.hidden_size // heads
    changes = {_key(config, "num_attention_heads"): keep * (heads // groups if groups > 1 else 1)}
    if groups > 1:
        changes |= {
            key: keep for key in ("num_key_value_heads", "num_kv_heads") if isinstance(setting(config, key), int)
        }
    # Some configs compute head_dim from the hidden size and take no other.
    computed = isinstance(getattr(type(config), "head_dim", None), property)
    return changes if computed else {**changes, "head_dim": head_dim}


def config_with(opened: OpenModel, changes: Mapping[str, Any]) -> Any:
    """The model's config with other values of its text part, as transformers reads it back."""
    raw = opened.model.config.to_dict()
    text = raw
    if opened.model.config.get_text_config() is not opened.model.config:
        text = raw["text_config"]
    text.update(changes)
    try:
        return type(opened.model.config).from_dict(raw)
    except Exception as error:  # whatever transformers' validators raise
        told = ", ".join(f"{key}={value}" for key, value in changes.items())
        raise RequestError(
            f"The config of {type(opened.model.model).__name__} does not take {told} ({one_line(error)}): "
            "choose another share, or --method depth."
        ) from error


def overridden_config(opened: OpenModel, groups: Sequence[CoupledGroup]) -> Any:
    """The model's config with the new shapes of `parts` listed one by one."""
    return type(opened.model.config).from_dict(
        {**opened.model.config.to_dict(), "quantization_config": override_entry(opened, groups)}
    )


def override_entry(opened: OpenModel, groups: Sequence[CoupledGroup]) -> dict[str, Any]:
    """The list of shapes for config.json, by the model's names of parameters."""
    infos = opened.model.tensor_map
    return sizes_entry(
        {infos[n].parameter or "": shape for group in groups for n, shape in group.shapes(infos).items()}
    )


def changed_shapes(opened: OpenModel, changes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters that have another shape with `changes` in the config, and that shape."""
    model = model_on_meta(config_with(opened, changes), opened.dtype, opened.trust_remote_code)
    there = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    here = opened.model.model.state_dict()
    return {name: there[name] for name, tensor in here.items() if there[name] != tuple(tensor.shape)}


def _check_place(opened: OpenModel, name: str | None, parameter: str, group: GroupName) -> None:
    info = opened.model.tensor_map.get(name or "")
    if info is None or info.entry.shape != tuple(opened.model.model.state_dict()[parameter].shape):
        raise RequestError(
            f"{parameter} would shrink with the {WORDS[group]}, but the checkpoint holds it in another layout than the "
            "model computes with: only linear layers stored one to one can be narrowed (experts: --method experts)."
        )
    if info.role not in ("linear map", "bias", "norm") or info.block is None:
        raise RequestError(
            f"{name} would shrink with the {WORDS[group]}, but it is no linear layer, bias or norm of a block "
            f"({info.reason or info.role}): this architecture cannot be narrowed so."
        )


def _shrinks(
    name: str, before: Sequence[int], after: Sequence[int], units: int, keep: int, group: GroupName
) -> tuple[int, int, int]:
    """(axis, rows of a unit, rows that stay whatever is removed)."""
    axes = [axis for axis, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    error_sq = before[axes[0]] - after[axes[0]]
    rows = error_sq // (units - keep)
    tail = before[axes[0]] - rows * units
    if len(axes) != 1 or error_sq <= 0 or error_sq % (units - keep) or tail < 0:
        raise RequestError(
            f"With {keep} of {units} {WORDS[group]} in the config, {name} would go from shape {list(before)} to "
            f"{list(after)}, no whole number of rows for each of the {WORDS[group]}: the config makes the real size "
            f"from this one and others. Use -o parts={_OTHER[group]} or --method depth."
        )
    return axes[0], rows, tail


def _consumers(opened: OpenModel, smaller: Mapping[str, tuple[int, int, int]], group: GroupName) -> dict[int, str]:
    """Of every block the one linear layer that loses inputs."""
    found: dict[int, list[str]] = {}
    for name, (axis, _, _) in smaller.items():
        info = opened.model.tensor_map[name]
        assert info.block is not None
        found.setdefault(info.block, [])
        if info.role == "linear map" and axis == (0 if info.transposed else 1):
            found[info.block].append(name)
    if not found:
        raise RequestError(
            f"Fewer {WORDS[group]} in the config of {type(opened.model.model).__name__} change no tensor: "
            + (
                "the heads have no head_dim of their own, and would be wider instead"
                if group == "heads"
                else "the real number follows from other settings (or all MLPs are experts: --method experts)"
            )
            + f". Use -o parts={_OTHER[group]} or --method depth."
        )
    for block, names in found.items():
        if len(names) != 1:
            raise RequestError(
                f"Block {block} has {len(names)} linear layers that read the {WORDS[group]}, where one is expected: "
                "this architecture cannot be narrowed so."
            )
    return {block: names[0] for block, names in found.items()}


def _one_width(smaller: Mapping[str, tuple[int, int, int]], consumers: Mapping[int, str], group: GroupName) -> int:
    widths = {smaller[name][1:] for name in consumers.values()}
    if len(widths) != 1 or next(iter(widths))[1]:
        raise RequestError(f"The layers that read the {WORDS[group]} differ between blocks: these cannot be narrowed.")
    return next(iter(widths))[0]


def _layouts(cut: tuple[int, int, int], width: int, group: GroupName) -> tuple[tuple[int, ...], ...]:
    """The orders that a unit's rows may lie in: together, or each kind (queries, keys, values; gate, up) by itself."""
    _, rows, _ = cut
    if group != "heads" and rows > width:
        return ((width,) * (rows // width), (rows,))
    head, odd = divmod(rows - width, 2)
    if group == "heads" and head > 0 and not odd and width % head == 0:
        return ((width, head, head), (rows,))
    return ((rows,),)
