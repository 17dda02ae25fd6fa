"""From a request, as a report keeps it, back to the command line that makes it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from prune_cli.request.presets import PRESETS
from prune_cli.request.request import PruneRequest

_POSITIONAL = ("model", "out")
# Hashes come from recipes; what a config file said stands among the fields.
_NOT_TYPED = ("inputs", "config")


def command_of(request: PruneRequest | Mapping[str, Any]) -> str:
    """The line for a shell whose run asks for `request` (the object, or its JSON in a report), words quoted."""
    return shlex.join(("prune-cli", "prune", *words_of(request)))


def words_of(request: PruneRequest | Mapping[str, Any]) -> list[str]:
    """The words after `prune-cli prune`; what equals a default, or what the preset says itself, is left out."""
    if isinstance(request, PruneRequest):
        explicit = {item.name: getattr(request, item.name) for item in dataclasses.fields(request)}
    else:
        explicit = dict(request)
    usual = {**_defaults(), **PRESETS.get(explicit.get("preset") or "", {})}
    options = [
        word
        for name, value in explicit.items()
        if name not in (*_POSITIONAL, *_NOT_TYPED) and _plain(value) != _plain(usual.get(name))
        for word in _option(name, value)
    ]
    places = [str(explicit[name]) for name in _POSITIONAL]
    # Before a name like -x, the rest must be said to be no options.
    return [*options, "--", *places] if any(place.startswith("-") for place in places) else [*places, *options]


def _defaults() -> dict[str, Any]:
    fields = [item for item in dataclasses.fields(PruneRequest) if item.name not in _POSITIONAL]
    return {
        item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        for item in fields
    }


def _plain(value: Any) -> Any:
    """JSON has lists where the request has tuples."""
    return list(value) if isinstance(value, tuple) else value


def _option(name: str, value: Any) -> Iterator[str]:
    if name == "options":
        for key, chosen in value.items():
            yield from ("-o", f"{key}={_text(chosen)}")
        return
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        yield option if value else f"--no-{option.removeprefix('--')}"
        return
    for each in value if isinstance(value, list | tuple) else [value]:
        yield from (option, _text(each))


def _text(value: Any) -> str:
    """How `-o` and the numbers of options are written: true, none, and floats with all their digits."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
