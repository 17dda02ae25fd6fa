"""The JSON Schema of a request, derived from `PruneRequest`: one for recipes, reports and --json. No torch here."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prune_cli.request.request import PruneRequest

_SIMPLE = {str: "string", Path: "string", bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}


@cache
def request_schema() -> dict[str, Any]:
    """Every option of a run as a property; null means that the user did not say.

    A field's metadata may hold `schema`, keywords beyond its type (limits, a pattern).
    """
    hints = typing.get_type_hints(PruneRequest)
    fields = dataclasses.fields(PruneRequest)
    return {
        "description": "Every option of the run, named like the command line's; null means that the user did not say.",
        "type": "object",
        "additionalProperties": False,
        "required": [item.name for item in fields if not _has_default(item)],
        "properties": {item.name: _of_type(hints[item.name]) | item.metadata.get("schema", {}) for item in fields},
    }


def _has_default(item: dataclasses.Field[Any]) -> bool:
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


def _of_type(kind: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    if kind is Any:
        return {}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[1:] == (...,):
        return {"type": "array", "items": _of_type(arguments[0])}
    if origin in (dict, Mapping):
        values = _of_type(arguments[1])
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    if origin in (types.UnionType, typing.Union):
        parts = [_of_type(argument) for argument in arguments]
        if all(part.keys() == {"type"} for part in parts):
            return {"type": [part["type"] for part in parts]}
        return {"anyOf": parts}
    raise TypeError(f"PruneRequest has a field of the type {kind}, for which request_schema.py knows no JSON Schema")
