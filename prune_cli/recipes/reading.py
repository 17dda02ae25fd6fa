"""A recipe read: every key and value held against the request's schema, every error with its line and column."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prune_cli.checkpoint.inputs import CALIBRATION, EVALUATION
from prune_cli.errors import RequestError
from prune_cli.recipes import core_yaml
from prune_cli.report.read import read_report
from prune_cli.report.types import Report
from prune_cli.request.request import request_as_json
from prune_cli.request.schema import request_schema

_WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list of texts",
    "object": "a table of KEY: VALUE",
}
_TAGS = {"integer": {core_yaml.INTEGER}, "boolean": {core_yaml.BOOLEAN}, "null": {core_yaml.NULL}}
_TAGS["number"] = {core_yaml.INTEGER, core_yaml.NUMBER}
# A plain word that looks like a number is text where text is wanted: a commit may be all digits.
_TAGS["string"] = {core_yaml.STRING, core_yaml.INTEGER, core_yaml.NUMBER}
_COMMAND_LINE_ONLY = ("dry_run", "keep_list_only", "json", "quiet", "verbose", "recipe", "save_recipe")
# About the files of the earlier run, not about what it did.
_NOT_REPEATED = ("resume", "overwrite", "save_statistics", "allow_changed_inputs", "config")


@dataclass(frozen=True)
class Recipe:
    """`values` by field of PruneRequest, only what is said; `places` (line, column) by field, or `options.KEY`."""

    path: Path
    values: Mapping[str, Any]
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def where(self, name: str) -> str:
        line, column = self.places.get(name, (None, None))
        return f"{self.path}, line {line}, column {column}" if line else f"{self.path}, {name}"


class _UnfitError(Exception):
    """A value of another type than wanted."""


def read_recipe(path: Path) -> Recipe:
    """The recipe in the YAML file `path`; a report (or the folder of a pruned model) is the recipe of its own run.

    Raises RequestError with line and column for what is no YAML, an option that does not exist or is said twice, and a
    value of a wrong type. What values mean is checked by `PruneRequest.check`.
    """
    if is_report(path):
        return _recipe_of_report(path)
    root = core_yaml.compose(_text_of(path), str(path))
    if not isinstance(root, yaml.MappingNode):
        raise RequestError(f"{path} is no recipe: it must hold OPTION: VALUE, a line each, as sparsity: 0.5.")
    values: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    for key, node in root.value:
        name = _field_of(path, key)
        if name in places:
            raise RequestError(f"{_place(path, key)}: {name} is said twice, first in line {places[name][0]}.")
        places[name] = (node.start_mark.line + 1, node.start_mark.column + 1)
        value = _value_of(path, name, node)
        if isinstance(node, yaml.MappingNode):
            places |= _places_within(path, name, node)
        if value is not None:
            values[name] = value
    return Recipe(path, _typed(values), places)


@contextmanager
def with_places(recipe: Recipe | None, explicit: Mapping[str, Any]) -> Iterator[None]:
    """A RequestError about a value that comes from `recipe`, not from the `explicit` ones, names its place."""
    try:
        yield
    except RequestError as error:
        name = _culprit(recipe, explicit, str(error)) if recipe is not None else None
        if recipe is None or name is None:
            raise
        raise RequestError(f"{recipe.where(name)}: {error}") from error


def _culprit(recipe: Recipe, explicit: Mapping[str, Any], message: str) -> str | None:
    """The field of the recipe that a message speaks of: told by its option, its value, or a method's own option."""
    for key in recipe.values.get("options", {}):
        if key not in explicit.get("options", {}) and re.search(rf" option '?{re.escape(key)}'?[ :]", message):
            return f"options.{key}"
    own = [(name, value) for name, value in recipe.values.items() if name not in explicit]
    by_option = [name for name, _ in own if f"--{name.replace('_', '-')} " in message]
    by_value = [name for name, value in own if isinstance(value, str) and repr(value) in message]
    return next(iter(by_option + by_value), None)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--recipe {path} cannot be read ({error.strerror}): give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--recipe {path} is no text in UTF-8 ({error}): give a YAML file.") from error


def is_report(path: Path) -> bool:
    """Whether `path` is a report, or the folder of a pruned model, and so the recipe of its own run."""
    if path.is_dir():
        return True
    if path.suffix != ".json":
        return False
    try:
        document = json.loads(_text_of(path))
    except (ValueError, RecursionError):
        return False  # the reader of YAML tells where it is wrong
    return isinstance(document, dict) and "request" in document


def _recipe_of_report(path: Path) -> Recipe:
    saved = read_report(path)
    asked, revision = request_as_json(saved.report.request), saved.report.model.revision
    values = {k: v for k, v in asked.items() if v is not None and k not in _NOT_REPEATED}
    values["inputs"] = _inputs_of(saved.report)
    if revision is not None:
        values["revision"] = revision
    return Recipe(saved.path, _typed(values))


def _inputs_of(report: Report) -> dict[str, str]:
    """Its `inputs`; of a report that does not list them, what it tells of weights and texts elsewhere."""
    found = {**report.model.files}
    if report.calibration is not None and not report.request.self_calibration:
        found[CALIBRATION] = report.calibration.sha256
    if report.evaluation is not None:
        found[EVALUATION] = report.evaluation.text.sha256
    return dict(report.inputs) or found


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """As PruneRequest holds them: paths and tuples."""
    typed: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return typed | {"out": Path(values["out"])} if "out" in values else typed


def _field_of(path: Path, key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise RequestError(f"{_place(path, key)}: an option must be a word, as sparsity.")
    name = key.value.replace("-", "_")
    known = list(request_schema()["properties"])
    if name in known:
        return name
    if name in _COMMAND_LINE_ONLY:
        raise RequestError(f"{_place(path, key)}: {key.value} is for the command line alone, not for a recipe.")
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    raise RequestError(f"{_place(path, key)}: there is no option {key.value!r}: {advice}")


def _value_of(path: Path, name: str, node: yaml.Node) -> Any:
    schema = request_schema()["properties"][name]
    try:
        return _read(node, schema)
    except _UnfitError:
        others = "a sequence" if isinstance(node, yaml.SequenceNode) else "a mapping"
        given = repr(node.value) if isinstance(node, yaml.ScalarNode) else others
        raise RequestError(f"{_place(path, node)}: {name} is {given}, but must be {_wanted(schema)}.") from None


def _places_within(path: Path, name: str, table: yaml.MappingNode) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    for key, node in table.value:
        inner = f"{name}.{key.value}"
        if inner in places:
            raise RequestError(f"{_place(path, key)}: {inner} is said twice, first in line {places[inner][0]}.")
        places[inner] = (node.start_mark.line + 1, node.start_mark.column + 1)
    return places


def _read(node: yaml.Node, schema: Mapping[str, Any]) -> Any:
    """The value of `node` in the type that `schema` wants; raises _UnfitError."""
    if "anyOf" in schema:
        return _read_any(node, schema["anyOf"])
    if "enum" in schema:
        if isinstance(node, yaml.ScalarNode) and node.value in schema["enum"]:
            return node.value
        raise _UnfitError
    if isinstance(node, yaml.ScalarNode):
        return _read_word(node, _types(schema))
    if isinstance(node, yaml.SequenceNode) and "array" in _types(schema):
        return [_read(item, schema.get("items", {})) for item in node.value]
    if isinstance(node, yaml.MappingNode) and "object" in _types(schema):
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise _UnfitError
        inner = schema.get("additionalProperties", {})
        return {key.value: _read(item, inner) for key, item in node.value}
    raise _UnfitError


def _read_any(node: yaml.Node, options: list[dict[str, Any]]) -> Any:
    for option in options:
        try:
            return _read(node, option)
        except _UnfitError:
            continue
    raise _UnfitError


def _read_word(node: yaml.ScalarNode, wanted: list[str]) -> Any:
    try:
        value = core_yaml.scalar(node)
    except ValueError:
        raise _UnfitError from None
    if not wanted:
        return value
    fit = [kind for kind in wanted if node.tag in _TAGS.get(kind, ())]
    if not fit:
        raise _UnfitError
    if fit[0] == "string":
        return node.value
    return float(value) if fit[0] == "number" else value


def _types(schema: Mapping[str, Any]) -> list[str]:
    types = schema.get("type", [])
    return [types] if isinstance(types, str) else list(types)


def _wanted(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_wanted(option) for option in schema["anyOf"])
    if "enum" in schema:
        several = len(schema["enum"]) > 1
        return ("one of " if several else "") + ", ".join(map(str, schema["enum"]))
    return " or ".join(_WORDS[kind] for kind in _types(schema) if kind != "null")


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
