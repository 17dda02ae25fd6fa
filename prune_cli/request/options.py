"""Options given as KEY=VALUE, read into the frozen dataclass of the method, step or allocation that owns them."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from prune_cli.errors import RequestError, did_you_mean


def parse_options(owner: str, options_type: type, given: Mapping[str, Any]) -> Any:
    """The owner's frozen options with `given` (texts or values) in place of defaults; raises RequestError."""
    kinds = typing.get_type_hints(options_type)
    known = {item.name for item in dataclasses.fields(options_type)}
    for name in given:
        if name not in known:
            there = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise RequestError(
                f"{owner[0].upper()}{owner[1:]} has no option {name!r}: {there}{did_you_mean(name, known)}."
            )
    values = {name: _convert(owner, name, value, kinds[name]) for name, value in given.items()}
    for item in dataclasses.fields(options_type):
        _check_limits(owner, item, values.get(item.name))
    return options_type(**values)


def _check_limits(owner: str, item: dataclasses.Field[Any], value: Any) -> None:
    """Numbers are finite and not beyond the `least` and `most` of their metadata."""
    least, most = item.metadata.get("least", -math.inf), item.metadata.get("most", math.inf)
    if isinstance(value, int | float) and not (math.isfinite(value) and least <= value <= most):
        bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"at most {most:g}"] * (most < math.inf)
        wanted = " and ".join(bounds) or "a finite number"
        raise RequestError(f"The option {item.name} of {owner} is {value!r}, but must be {wanted}.")


def _convert(owner: str, name: str, value: Any, kind: Any) -> Any:
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value in choices:
            return value
        wanted = "one of " + ", ".join(str(choice) for choice in choices)
    elif typing.get_origin(kind) is types.UnionType and types.NoneType in choices:
        return None if value in (None, "none") else _convert(owner, name, value, choices[0])
    elif kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
        wanted = "true or false"
    else:
        try:
            return kind(value)
        except (TypeError, ValueError):
            wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
    raise RequestError(f"The option {name} of {owner} is {value!r}, but must be {wanted}.")
