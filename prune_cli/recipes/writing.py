"""A request written as a recipe: what was said, and what makes its repetition exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from prune_cli.errors import RequestError
from prune_cli.recipes.core_yaml import dump
from prune_cli.request.request import PruneRequest
from prune_cli.version import __version__

_HEADER = """\
# A recipe of prune-cli {version}. Repeat the run with
#   prune-cli prune --recipe FILE
# The command line wins over it: prune-cli prune --recipe FILE OUT --sparsity 0.6
# Paths are taken from where the command is run.
"""
_PINNED = "# revision is the commit that was read.\n"


def check_recipe_path(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a file that is there already or cannot be written."""
    if path.exists() and not overwrite:
        raise RequestError(f"--save-recipe {path} exists already: choose another file, or add --overwrite.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise RequestError(f"--save-recipe {path} is no file that can be written: its folder must exist.")


def write_recipe(
    path: Path, request: PruneRequest, explicit: Collection[str], revision: str | None, inputs: Mapping[str, str]
) -> None:
    """Write the recipe of `request`; the commit of a hub model and the hashes of what was read pin it."""
    pinned = dataclasses.replace(
        request,
        revision=revision or request.revision,
        inputs=inputs or request.inputs,
        allow_changed_inputs=False,
        config=None,
    )
    explicit = [name for name in explicit if name not in ("allow_changed_inputs", "config")]
    path.write_text(recipe_text(pinned, explicit, pinned=revision is not None), encoding="utf-8")


def recipe_text(request: PruneRequest, explicit: Collection[str] = (), *, pinned: bool = False) -> str:
    """The fields that are `explicit` and those that differ from their defaults (as by a preset), in their order."""
    values = {
        item.name: _plain(getattr(request, item.name))
        for item in dataclasses.fields(request)
        if item.name in explicit or getattr(request, item.name) != _default(item)
    }
    values = {name: value for name, value in values.items() if value is not None}
    return _HEADER.format(version=__version__) + (_PINNED if pinned else "") + dump(values)


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if hasattr(value, "keys") else value
