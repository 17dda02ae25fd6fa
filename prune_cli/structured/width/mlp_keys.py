"""The keys of a config that say how wide MLPs and experts are, and what each of them narrows.

One key may be that of dense MLPs and experts at once (Jamba), or of experts and of an expert that all tokens see, which
is as wide as several (DeepSeek).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from prune_cli.engine.open_model import OpenModel
from prune_cli.errors import RequestError
from prune_cli.model.architecture import setting
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.structured.units import CoupledGroup, GroupName, UnitLayout
from prune_cli.structured.width.coupling import WIDTH_KEYS, changed_shapes, group_choices, unit_count, width_key

_KEYS = (
    *WIDTH_KEYS, "intermediate_size_mlp", "moe_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size",
    "shared_expert_intermediate_size", "shared_experts_intermediate_size", "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
)  # fmt: skip


def width_keys(opened: OpenModel) -> dict[str, int]:
    """The keys, and the width that each has. Raises RequestError where there is none."""
    if not any(info.role == "expert" for info in opened.model.tensor_map.values()):
        return {width_key(opened): unit_count(opened, "mlp")}
    config = opened.model.config.get_text_config()
    other_names = config.attribute_map or {}
    found = {key: setting(config, key) for key in _KEYS if other_names.get(key) not in _KEYS}
    widths = {key: width for key, width in found.items() if isinstance(width, int) and width > 1}
    used = {key: width for key, width in widths.items() if changed_shapes(opened, {key: width // 2})}
    if not used:
        raise RequestError(
            f"No key of the config of {type(opened.model.model).__name__} says how wide its MLPs or experts are, which "
            "cannot change then: use -o parts=heads, --method experts or depth."
        )
    return used


def find_groups(opened: OpenModel, key: str, units: int, keep: int) -> Iterator[tuple[CoupledGroup, ...]]:
    """As `find_group`: all that narrows with one `key` of the config, of MLPs, experts, and experts that all see."""
    changes = {key: keep}
    of_experts: dict[str, tuple[int, ...]] = {}
    plain: dict[str, tuple[int, ...]] = {}
    modules = {info.module_name for info in opened.model.tensor_map.values() if info.role == "expert"}
    for parameter, shape in changed_shapes(opened, changes).items():
        (of_experts if parameter.rpartition(".")[0] in modules else plain)[parameter] = shape
    choices: list[list[CoupledGroup]] = []
    # Where nothing changes, `group_choices` says so.
    for part in _split(plain) or ([] if of_experts else [{}]):
        name: GroupName = "shared" if any("shared" in parameter for parameter in part) else "mlp"
        choices.append(list(group_choices(opened, name, _counts(opened, part, units, keep), changes, part)))
    if of_experts:
        choices.append(list(_expert_choices(opened, of_experts, units, keep, changes)))
    return itertools.product(*choices)


def _split(plain: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """MLPs and shared experts, which may stand in one block and are of their own widths."""
    parts = [{n: s for n, s in plain.items() if ("shared" in n) == shared} for shared in (False, True)]
    return [part for part in parts if part]


def _counts(opened: OpenModel, part: Mapping[str, tuple[int, ...]], units: int, keep: int) -> tuple[int, int]:
    """How many channels there are and stay in an MLP as wide as several experts; in all others as the config says."""
    for parameter, shape in part.items():
        before = opened.model.shape_of(parameter)
        times, rest = divmod(before[-1], units)
        if len(shape) == 2 and before[-1] != shape[-1] == times * keep and not rest:
            return times * units, times * keep
    return units, keep


def _expert_choices(
    opened: OpenModel, changed: Mapping[str, tuple[int, ...]], units: int, keep: int, changes: Mapping[str, Any]
) -> Iterator[CoupledGroup]:
    """Gate and up lie one after the other or row by row; all that are stored apart have one row a unit."""
    infos = opened.model.tensor_map
    names = [name for name, info in infos.items() if info.parameter in changed]
    rows: dict[str, tuple[int, int]] = {}
    for name in names:
        rows[name] = _axis_and_rows(infos[name], opened.model.shape_of(infos[name].parameter or ""), changed, units)
    consumers: dict[int, str] = {}
    experts = {infos[name].expert.experts for name in names if infos[name].expert is not None}  # pyright: ignore[reportOptionalMemberAccess]
    for name in names:
        part = infos[name].expert
        if part is not None and part.down:
            consumers.setdefault(infos[name].block or 0, name)
    if len(experts) != 1 or not consumers:
        raise RequestError(
            f"The experts of {type(opened.model.model).__name__} are not all of one kind: not supported."
        )
    blocks = {name: infos[name].block or 0 for name in names}
    several = any(per_unit > 1 for _, per_unit in rows.values())
    for together in (False, True) if several else (False,):
        slices = {name: _layout(infos[name], *rows[name], together=together) for name in names}
        yield CoupledGroup("experts", units, keep, 1, consumers, slices, blocks, changes, experts=next(iter(experts)))


def _axis_and_rows(
    info: TensorInfo, before: tuple[int, ...], changed: Mapping[str, tuple[int, ...]], units: int
) -> tuple[int, int]:
    """The axis of the tensor, as stored, that has the units, and how many rows each has there."""
    after, part, shape = changed[info.parameter or ""], info.expert, info.entry.shape
    axes = [axis for axis, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if part is None and (info.role != "bias" or shape != before):
        raise RequestError(f"{info.entry.name}: {info.reason}, so experts of this architecture cannot be narrowed.")
    axis = axes[0]
    if part is not None and part.turned:
        axis = 3 - axis
    elif part is not None and part.index is not None:
        axis -= 1
    rows, rest = divmod(shape[axis], units)
    if len(axes) != 1 or rest:
        raise RequestError(
            f"{info.entry.name} has the shape {list(shape)}, no whole number of rows for each of the {units} channels "
            "of an expert: this architecture cannot be narrowed so."
        )
    return axis, rows


def _layout(info: TensorInfo, axis: int, rows: int, *, together: bool) -> UnitLayout:
    sections = (rows,) if together else (1,) * rows
    index = None if info.expert is None else info.expert.index
    return UnitLayout(axis, sections, expert=index, stacked=index is None)
