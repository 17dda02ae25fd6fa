"""From a JSON document back to the dataclasses that it was written from."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any


def from_json(kind: Any, value: Any) -> Any:
    """`value`, valid by `schema_of(kind)`, as a `kind`; what the document leaves out takes its default."""
    if dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return typing.cast("Any", kind)(**{name: from_json(hints[name], each) for name, each in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Path:
        return Path(value)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else from_json(arguments[0], value)
    if origin is tuple:
        return tuple(from_json(arguments[0], each) for each in value)
    if origin is Sequence:
        return [from_json(arguments[0], each) for each in value]
    if origin is Mapping:
        return {key: from_json(arguments[1], each) for key, each in value.items()}
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
