"""YAML as its version 1.2 reads plain words: `2:4` is no number to the base of 60, `on` and `no` are no booleans."""

from __future__ import annotations

import re
from typing import Any

import yaml

from prune_cli.errors import RequestError

STRING, INTEGER, NUMBER, BOOLEAN, NULL = (
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")
)
_PLAIN_WORDS = (
    (NULL, r"~|null|Null|NULL|", [*"~nN", ""]),
    (BOOLEAN, r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    (INTEGER, r"[-+]?[0-9]+", [*"-+0123456789"]),
    (NUMBER, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    (NUMBER, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
)


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _PLAIN_WORDS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Line breaks and other signs that cannot be seen stand as escapes: other quotes would fold them."""
    return dumper.represent_scalar(STRING, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)


def compose(text: str, name: str) -> yaml.Node | None:
    """The one document of `text` as nodes with their places, None if there is none; RequestError names the place."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}, line {mark.line + 1}, column {mark.column + 1}"
        raise RequestError(f"{where}: this is no YAML ({error.problem or error.context}).") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RequestError(f"{name} is no YAML ({' '.join(str(error).split())}).") from error


def scalar(node: yaml.ScalarNode) -> Any:
    """The value of a plain or quoted word: text, int, float, bool or None. ValueError for a number too long to read."""
    word = node.value
    if node.tag == NULL:
        return None
    if node.tag == BOOLEAN:
        return word.lower() == "true"
    if node.tag == INTEGER:
        return int(word)
    if node.tag == NUMBER:
        return float(word.replace(".inf", "inf").replace(".nan", "nan") if word[-1].isalpha() else word)
    return word


def dump(values: dict[str, Any]) -> str:
    """`values` as a block of YAML in the order given."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
