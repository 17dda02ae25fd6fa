"""The numbers of a report by their names, as rules speak of them: evaluation.after.perplexity. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial, reduce
from typing import Any

from prune_cli.checks.figures import Figures
from prune_cli.checks.limits import Limit
from prune_cli.checks.rules import CheckResult, Rule
from prune_cli.report.format import percent, size
from prune_cli.report.schema import report_schema
from prune_cli.report.types import Report

# Those that are measured again on a model's folder, by what they are called there.
_MEASURED = {
    "evaluation.after.perplexity": "perplexity",
    "evaluation.before.perplexity": "dense_perplexity",
    "totals.sparsity_of_pruned": "sparsity",
    "totals.bytes_after": "bytes",
    "totals.bytes_before": "dense_bytes",
}
_NOT_FOUND_OUT = ("request", "schema_version")


@cache
def numeric_fields() -> tuple[str, ...]:
    """All numbers that stand in a report once, those of lists left out."""
    schema = report_schema()
    found = {name: part for name, part in schema["properties"].items() if name not in _NOT_FOUND_OUT}
    return tuple(_numbers(found))


def _numbers(properties: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in properties.items():
        for part in schema.get("anyOf", [schema]):
            types = part.get("type", ())
            if {"number", "integer"} & set([types] if isinstance(types, str) else types):
                yield name
            yield from (f"{name}.{inner}" for inner in _numbers(part.get("properties", {})))


def told_fields(report: Report) -> dict[str, float]:
    """The numbers that `report` has, by their names."""
    values = {name: reduce(_inner, name.split("."), report) for name in numeric_fields()}
    return {name: float(value) for name, value in values.items() if value is not None}


def _inner(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def field_rule(name: str, bound: str) -> Rule:
    """That the field `name` is at least (`bound` is min) or at most (max) the limit."""
    figure = _MEASURED.get(name, name)
    return Rule(f"{name} ({bound})", "bound", [figure], partial(_decide, figure, bound == "min"))


def _decide(figure: str, least: bool, rule: str, limit: Limit, figures: Figures) -> CheckResult:
    (value,) = figures.need(rule, figure)
    unit = limit.text.rstrip()[-1:]
    measured = percent(value) if unit == "%" else size(value) if unit in "bB" else f"{value:.6g}"
    passed = value >= limit.value if least else value <= limit.value
    asked = f"at {'least' if least else 'most'} {limit.text}"
    return CheckResult(rule, asked, measured, passed, limit.value, value)
