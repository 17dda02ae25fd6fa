"""What a search tells: search.json, and allocation.json for `prune --allocate file:`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from prune_cli.engine.evaluate import mean, standard_error
from prune_cli.report.types import Evaluation, TextReport

SCHEMA_VERSION = 1
SEARCH_JSON, ALLOCATION_JSON = "search.json", "allocation.json"
# Two standard errors either way: 95 %.
_SURE = 1.96


@dataclass(frozen=True)
class Candidate:
    """One allocation that was judged: the searches it belongs to, its loss on the held-out windows in nats."""

    of: Sequence[str]
    held_out_loss: float
    sparsity: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """The uniform allocation, or the best of a search: measured on --data, against the uniform one in nats."""

    name: str
    held_out_loss: float
    evaluation: Evaluation
    over_uniform: float
    over_uniform_standard_error: float
    sparsity: Mapping[str, float]


@dataclass(frozen=True)
class SearchReport:
    """Everything about one search; tables are by block, `allocation` by tensor."""

    schema_version: int
    tool: Mapping[str, str]
    created: str
    request: Mapping[str, Any]
    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    protocol: str
    text: TextReport
    calibration: TextReport | None
    held_out_windows: int
    method: str
    asked_sparsity: float
    dense: Evaluation
    candidates: Sequence[Candidate]
    results: Sequence[Result]
    winner: str
    verdict: str
    allocation: Mapping[str, Any]
    seconds: float
    warnings: Sequence[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def verdict(name: str, losses: Sequence[float], baseline: str, others: Sequence[float], text: str) -> str:
    """One sentence: whether `name` beats `baseline` on the same windows, beyond chance."""
    gained = [other - mine for mine, other in zip(losses, others, strict=True)]
    gain, error = mean(gained), standard_error(gained)
    told = f"{abs(gain):.4f} ± {error:.4f} nats per token on {len(gained)} windows of {text}"
    if not any(gained):
        return f"{name} found nothing else than {baseline}"
    if gain > _SURE * error and len(gained) > 1:
        return f"{name} beats {baseline} by {told}"
    return f"{name} does not beat {baseline}: it is {told} {'better, within chance' if gain > 0 else 'worse'}"


@cache
def search_schema() -> dict[str, Any]:
    """The JSON Schema that every search.json satisfies."""
    return json.loads(resources.files("prune_cli.sweeps").joinpath("search.schema.json").read_text(encoding="utf-8"))
