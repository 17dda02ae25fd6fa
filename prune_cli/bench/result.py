"""What a measurement tells: times of every round, their medians, and ratios with the spread over the rounds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

SCHEMA_VERSION = 1
_P95 = 0.95
# Rounds that differ by more than this leave no figure worth quoting.
_WIDE = 0.2


@dataclass(frozen=True)
class Round:
    """Seconds until the first new token (the prompt's forward pass), and between each pair of tokens after it."""

    first_token_seconds: float
    token_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Figure:
    """The median of the rounds, and the lowest and the highest of them."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class ModelFigures:
    """One model. Rates in tokens per second over the whole batch, latency in seconds per new token.

    `bytes_on_disk` counts the safetensors, `parameters` each tied tensor once. On a GPU the peaks are what torch
    allocated there; elsewhere the process's resident memory beyond `library_bytes`, which torch and transformers take.
    """

    model: str
    revision: str | None
    architecture: str
    dtype: str
    parameters: int
    bytes_on_disk: int
    load_seconds: float
    library_bytes: int
    peak_loading_bytes: int
    peak_running_bytes: int
    prefill: Figure
    decode: Figure
    latency_median: Figure
    latency_p95: Figure
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Ratio:
    """`figure` of MODEL divided by that of OTHER, round by round: the median, the lowest and the highest.

    The verdict is `higher` or `lower` where every round says so, else `undecided`; what is measured once has one value.
    """

    figure: str
    ratio: float
    lowest: float
    highest: float
    verdict: Literal["higher", "lower", "equal", "undecided"]


@dataclass(frozen=True)
class BenchResult:
    """Everything about one measurement; `ratios` is empty where one model was measured alone."""

    schema_version: int
    tool: Mapping[str, str]
    created: str
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    protocol: str
    models: tuple[ModelFigures, ...]
    ratios: tuple[Ratio, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


@cache
def bench_schema() -> dict[str, Any]:
    """The JSON Schema that every result satisfies."""
    return json.loads(resources.files("prune_cli.bench").joinpath("bench.schema.json").read_text(encoding="utf-8"))


Rate = Callable[[Round], float]


def rates_of(prompt_tokens: int, batch_size: int) -> dict[str, Rate]:
    """What is computed from one round: tokens per second over the batch, seconds per token."""
    return {
        "prefill": lambda r: batch_size * prompt_tokens / r.first_token_seconds,
        "decode": lambda r: batch_size * len(r.token_seconds) / math.fsum(r.token_seconds),
        "latency_median": lambda r: statistics.median(r.token_seconds),
        "latency_p95": lambda r: p95(r.token_seconds),
    }


def p95(values: Sequence[float]) -> float:
    """The smallest value that at least 95 % of `values` do not exceed."""
    return sorted(values)[math.ceil(_P95 * len(values)) - 1]


def figure_of(rate: Rate, rounds: Sequence[Round]) -> Figure:
    values = [rate(each) for each in rounds]
    return Figure(statistics.median(values), min(values), max(values))


def compare(ours: ModelFigures, other: ModelFigures, rates: Mapping[str, Rate]) -> tuple[Ratio, ...]:
    """Facts first, then timings: the ratio of the medians, and the span of the ratios round by round."""
    ratios = [
        _ratio(figure, [getattr(ours, figure) / getattr(other, figure)])
        for figure in ("parameters", "bytes_on_disk", "load_seconds", "peak_loading_bytes", "peak_running_bytes")
        if getattr(other, figure)
    ]
    for figure, rate in rates.items():
        pairs = zip(ours.rounds, other.rounds, strict=True)
        medians = getattr(ours, figure).median / getattr(other, figure).median
        ratios.append(_ratio(figure, [rate(mine) / rate(theirs) for mine, theirs in pairs], medians))
    return tuple(ratios)


def _ratio(figure: str, values: Sequence[float], ratio: float | None = None) -> Ratio:
    lowest, highest = min(values), max(values)
    verdict = "undecided"
    if lowest > 1 or highest < 1:
        verdict = "higher" if lowest > 1 else "lower"
    elif lowest == highest == 1:
        verdict = "equal"
    return Ratio(figure, values[0] if ratio is None else ratio, lowest, highest, verdict)


def spread_warnings(models: Sequence[ModelFigures], ratios: Sequence[Ratio]) -> tuple[str, ...]:
    """A sentence for each rate whose rounds differ too much to be quoted."""
    warnings: list[str] = []
    for figure in ("prefill", "decode"):
        for what, median, low, high in _spreads(figure, models, ratios):
            if high - low > _WIDE * median:
                sure = (
                    "every round says which is faster, but not by how much" if low > 1 or high < 1 else "no conclusion"
                )
                warnings.append(
                    f"{what} differs between rounds by {(high - low) / median:.0%} of its median "
                    f"({sure if ratios else 'no figure to quote'}): measure on a quiet machine, with more --repeats or "
                    "more tokens."
                )
    return tuple(warnings)


def _spreads(
    figure: str, models: Sequence[ModelFigures], ratios: Sequence[Ratio]
) -> list[tuple[str, float, float, float]]:
    """Of the ratio where there is one: a machine that slows down for both models does not move it."""
    for ratio in ratios:
        if ratio.figure == figure:
            return [(f"The {figure} ratio", ratio.ratio, ratio.lowest, ratio.highest)]
    rates: list[Figure] = [getattr(model, figure) for model in models]
    return [(f"The {figure} rate", rate.median, rate.lowest, rate.highest) for rate in rates]
