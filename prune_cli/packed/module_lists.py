"""Lists of modules in a `quantization_config`, for an output whose blocks or experts have other numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prune_cli.errors import RequestError
from prune_cli.packed.detect import quantisation

_LISTS = ("modules_to_not_convert", "ignored_layers", "modules_to_convert", "ignore")
_REGEX = "re:"
# From a block's number to its new one, None if it is gone; the same of an expert, with its block's number first.
BlockNumber = Callable[[int], int | None]
ExpertNumber = Callable[[int, int], int | None]


def renumber_modules(config: Mapping[str, Any], blocks: str, block_number: BlockNumber, expert: ExpertNumber) -> None:
    """Change the lists in `config`, a config.json, in place; `blocks` is what the list of blocks is called (`layers`).

    Entries of what is gone go too. Entries that name no number stay.
    """
    for where, key in _infos(config):
        renamed = [_renumbered(entry, blocks, block_number, expert) for entry in where[key]]
        where[key] = [entry for entry in renamed if entry is not None]


def check_lists(before: Mapping[str, Any], after: Mapping[str, Any], modules: Mapping[str, str]) -> None:
    """Raise RequestError where an entry speaks of other modules than before; `modules` maps old names to new ones."""
    old, new = [[where[key] for where, key in _infos(config)] for config in (before, after)]
    for entries, changed in zip(old, new, strict=True):
        for module, renamed in modules.items():
            if _listed(module, entries) != _listed(renamed, changed):
                entry = next((e for e in (*entries, *changed) if _matches(module, e) != _matches(renamed, e)), module)
                raise RequestError(
                    f"config.json lists {entry!r} among its quantised or plain modules, which would be others in the "
                    f"output ({module} becomes {renamed}): use --packed bf16."
                )


def _infos(config: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    found = quantisation(config) or {}
    groups = found.get("config_groups")
    wheres = [(found, _LISTS), *((group, ("targets",)) for group in (groups or {}).values())]
    for where, keys in wheres:
        for key in keys:
            if isinstance(where, dict) and isinstance(where.get(key), list):
                yield where, key


def _renumbered(entry: Any, blocks: str, block_number: BlockNumber, expert: ExpertNumber) -> str | None:
    """Numbers stand after a dot, which a regular expression may write with a backslash."""
    found = re.search(rf"(?<!\w){blocks}(\\?\.)(\d+)(?!\d)", entry)
    if found is None:
        return entry
    old = int(found[2])
    new = block_number(old)
    if new is None:
        return None
    head, tail = entry[: found.start(2)], entry[found.end(2) :]
    inner = re.search(r"(?<!\w)experts(\\?\.)(\d+)(?!\d)", tail)
    if inner is not None:
        number = expert(old, int(inner[2]))
        if number is None:
            return None
        tail = tail[: inner.start(2)] + str(number) + tail[inner.end(2) :]
    return f"{head}{new}{tail}"


def _listed(module: str, entries: Sequence[str]) -> bool:
    return any(_matches(module, entry) for entry in entries)


def _matches(module: str, entry: str) -> bool:
    """As compressed-tensors reads `re:` and transformers the lists of FP8 and MXFP4."""
    if entry.startswith(_REGEX):
        return re.match(entry.removeprefix(_REGEX), module) is not None
    try:
        return module.endswith(entry) or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:
        return False
