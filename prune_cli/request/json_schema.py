"""The JSON Schema (draft 2020-12) of a dataclass, derived from its fields and their types. No torch here."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

_SIMPLE = {str: "string", Path: "string", bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}


class Keywords:
    """What a type in `Annotated` must satisfy beyond itself, in the words of JSON Schema."""

    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords


def schema_of(kind: Any) -> dict[str, Any]:
    """The schema of a dataclass or of the type of a field; raises TypeError for types that JSON has not.

    A dataclass gives its docstring as description; its fields without a default are required, and their metadata may
    hold `schema`, keywords beyond the type.
    """
    if dataclasses.is_dataclass(kind):
        return _of_dataclass(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    if kind is Any:
        return {}
    if origin is Annotated:
        return schema_of(arguments[0]) | {k: v for more in kind.__metadata__ for k, v in more.keywords.items()}
    if origin is Literal:
        return {"enum": list(arguments)}
    if (origin is tuple and arguments[1:] == (...,)) or origin is Sequence:
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin in (dict, Mapping):
        values = schema_of(arguments[1])
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    if origin in (types.UnionType, typing.Union):
        return _of_union([schema_of(argument) for argument in arguments])
    raise TypeError(f"a field has the type {kind}, for which json_schema.py knows no JSON Schema")


def _of_union(parts: list[dict[str, Any]]) -> dict[str, Any]:
    # Limits of numbers say nothing of null, so one list of types tells the same in fewer words.
    limits = [part for part in parts if part.keys() != {"type"}]
    if not limits or (len(limits) == 1 and limits[0].get("type") in ("integer", "number")):
        return {key: value for part in limits for key, value in part.items()} | {"type": [p["type"] for p in parts]}
    return {"anyOf": parts}


def _of_dataclass(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    own = {} if _docstring(kind) is None else {"description": _docstring(kind)}
    return own | {
        "type": "object",
        "additionalProperties": False,
        "required": [item.name for item in fields if not _has_default(item)],
        "properties": {item.name: schema_of(hints[item.name]) | item.metadata.get("schema", {}) for item in fields},
    }


def _docstring(kind: Any) -> str | None:
    """The one that was written: dataclasses make one of the signature where there is none."""
    text = kind.__doc__
    return None if text is None or text.startswith(f"{kind.__name__}(") else " ".join(text.split())


def _has_default(item: dataclasses.Field[Any]) -> bool:
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
