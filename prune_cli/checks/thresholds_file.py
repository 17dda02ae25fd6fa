"""`check --thresholds FILE`: rules from YAML or JSON, by the options' names and the report's fields. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from prune_cli.checks.fields import field_rule, numeric_fields
from prune_cli.checks.limits import Limit, parse_bound, parse_limit
from prune_cli.checks.rules import REQUIRE_LOADABLE, RULES, Rule
from prune_cli.errors import RequestError, did_you_mean
from prune_cli.recipes import core_yaml

_EXAMPLE = "max-perplexity-increase: 5%, or totals.bytes_after: {max: 4GB}"
_BOUNDS = ("min", "max")
_OPTIONS = {rule.option.removeprefix("--"): rule for rule in RULES}


@dataclass(frozen=True)
class ThresholdsFile:
    """`limits` as typed, by option; `fields` are bounds on what a report holds; whether it must be `loadable`."""

    limits: Mapping[str, str]
    fields: tuple[tuple[Rule, Limit], ...]
    loadable: bool


NO_FILE = ThresholdsFile({}, (), loadable=False)


def read_thresholds(path: Path) -> ThresholdsFile:
    """Raises RequestError that names line and column of what is no rule, no field, or no limit."""
    root = core_yaml.compose(_text_of(path), str(path))
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise RequestError(f"{path} holds no rules: write NAME: LIMIT, a line each, as {_EXAMPLE}.")
    limits: dict[str, str] = {}
    fields: list[tuple[Rule, Limit]] = []
    loadable, seen = False, dict[str, int]()
    for key, node in root.value:
        name = _name(path, key)
        option = name.replace("_", "-")
        if name in seen:
            raise RequestError(f"{_place(path, key)}: {name} is said twice, first in line {seen[name]}.")
        seen[name] = key.start_mark.line + 1
        if option in _OPTIONS:
            limits[f"--{option}"] = _limit(path, name, node, _OPTIONS[option])
        elif option == REQUIRE_LOADABLE.removeprefix("--"):
            loadable = _truth(path, name, node)
        else:
            fields += _bounds(path, name, key, node)
    return ThresholdsFile(limits, tuple(fields), loadable)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise RequestError(f"--thresholds {path} cannot be read ({why}): give a YAML or JSON file.") from error


def _name(path: Path, key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise RequestError(f"{_place(path, key)}: a rule's name must be a word, as in {_EXAMPLE}.")
    return key.value


def _word(path: Path, name: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag == core_yaml.NULL:
        raise RequestError(f"{_place(path, node)}: {name} must be followed by one limit, as in {_EXAMPLE}.")
    return node.value


def _parsed(path: Path, node: yaml.Node, parse: Callable[[], Limit]) -> Limit:
    """What `parse` returns; the RequestError that it raises gets its place."""
    try:
        return parse()
    except RequestError as error:
        raise RequestError(f"{_place(path, node)}: {error}") from error


def _limit(path: Path, name: str, node: yaml.Node, rule: Rule) -> str:
    text = _word(path, name, node)
    _parsed(path, node, lambda: parse_limit(name, text, rule.kind))
    return text


def _truth(path: Path, name: str, node: yaml.Node) -> bool:
    if not isinstance(node, yaml.ScalarNode) or node.tag != core_yaml.BOOLEAN:
        raise RequestError(f"{_place(path, node)}: {name} must be true or false.")
    return bool(core_yaml.scalar(node))


def _bounds(path: Path, name: str, key: yaml.Node, node: yaml.Node) -> list[tuple[Rule, Limit]]:
    """What a report's field called `name` must be: at least `min`, at most `max`."""
    known = numeric_fields()
    if name not in known:
        near = did_you_mean(name, [*known, *_OPTIONS])
        raise RequestError(
            f"{_place(path, key)}: there is no rule and no number of a report called {name!r}{near}: rules are "
            f"{', '.join(_OPTIONS)}, {REQUIRE_LOADABLE.removeprefix('--')}, and fields as totals.bytes_after."
        )
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise RequestError(f"{_place(path, node)}: {name} must be followed by its bounds, as {{min: 0.4, max: 0.6}}.")
    found: dict[str, tuple[Rule, Limit]] = {}
    for inner, value in node.value:
        bound = _name(path, inner)
        if bound not in _BOUNDS or bound in found:
            raise RequestError(f"{_place(path, inner)}: {name} takes min and max, once each, not {bound!r}.")
        text = _word(path, f"{name}: {bound}", value)
        limit = _parsed(path, value, lambda text=text, bound=bound: parse_bound(f"{name}: {bound}", text))
        found[bound] = field_rule(name, bound), limit
    return list(found.values())


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
