"""`--allocate`: how the sparsity is spread over the tensors; names, options and files. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prune_cli.errors import RequestError, did_you_mean
from prune_cli.request.options import parse_options

FILE = "file:"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class NoOptions:
    """The options of an allocation that has none."""


@dataclass(frozen=True)
class OwlOptions:
    """Yin et al., arXiv:2310.05175, section 3.3."""

    outlier: float = field(
        default=5.0, metadata={"help": "An outlier's score is above this many times the mean (M).", "least": 0}
    )
    spread: float = field(
        default=0.08,
        metadata={"help": "How far a block may lie from the mean sparsity (lambda).", "least": 0, "most": 1},
    )


@dataclass(frozen=True)
class AtpOptions:
    """arXiv:2502.14770."""

    slope: float | None = field(
        default=None, metadata={"help": "Sparsity added per block; none searches for it.", "least": -1, "most": 1}
    )
    candidates: int = field(default=6, metadata={"help": "How many slopes the search tries, 0 among them.", "least": 1})


@dataclass(frozen=True)
class Strategy:
    """What an allocation states about itself; `needs_text` if it measures the dense model first."""

    summary: str
    paper: str
    cost: str
    options: type = NoOptions
    needs_text: bool = False


STRATEGIES: dict[str, Strategy] = {
    "uniform": Strategy("Every tensor gives the same share.", "the papers' own setting", "none"),
    "erk": Strategy(
        "Density in proportion to (in + out) / (in x out): small layers keep more.",
        "Mocanu et al. 2018; Evci et al., arXiv:1911.11134",
        "none",
    ),
    "owl": Strategy(
        "Blocks whose Wanda scores have more outliers keep more.",
        "Yin et al., arXiv:2310.05175",
        "one pass of the dense model",
        OwlOptions,
        needs_text=True,
    ),
    "atp": Strategy(
        "Sparsity grows by the same step from block to block; the step with the lowest calibration loss under Wanda.",
        "arXiv:2502.14770",
        "one Wanda pass per slope tried",
        AtpOptions,
        needs_text=True,
    ),
    "sensitivity": Strategy(
        "One threshold over all linear layers, on what the output of its block loses without a weight; within 0.2.",
        "squared Jacobians by random vectors (Hutchinson 1990), on Wanda's squared score",
        "one pass of the dense model with a few batches, and a backward pass of each block by itself",
        needs_text=True,
    ),
    "global": Strategy(
        "One threshold over all tensors: on |W|, or for methods that read inputs on Wanda scores over their RMS.",
        "global pruning as in Blalock et al., arXiv:2003.03033",
        "one pass of the dense model (none for methods without)",
    ),
}


@dataclass(frozen=True)
class Allocation:
    """The table of a run: `sparsity` by tensor name, `facts` what it was chosen from. Written into the report."""

    strategy: str
    options: Mapping[str, Any]
    sparsity: Mapping[str, float]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": _SCHEMA_VERSION, **asdict(self)}


def check_allocation(given: str, options: Mapping[str, Any]) -> Any:
    """The options of the allocation called `given`; raises RequestError for one that does not exist."""
    if given.startswith(FILE):
        name, kind = "file", NoOptions
    elif given in STRATEGIES:
        name, kind = given, STRATEGIES[given].options
    else:
        raise RequestError(
            f"--allocate is {given!r}: choose one of {', '.join(STRATEGIES)}, auto, or file:PATH"
            f"{did_you_mean(given, STRATEGIES)}."
        )
    return parse_options(f"the allocation {name}", kind, options)


def read_allocation(given: str, names: Sequence[str]) -> dict[str, float]:
    """The table of `file:PATH` (an allocation or a report); raises RequestError unless it is one for `names`."""
    path = Path(given.removeprefix(FILE)).expanduser()
    table = _table(path)
    unknown, missing = sorted(table.keys() - set(names)), sorted(set(names) - table.keys())
    if unknown or missing:
        trouble = f"names {unknown[0]}, which this run does not prune" if unknown else f"says nothing of {missing[0]}"
        raise RequestError(f"{path} {trouble} ({len(unknown)} too many, {len(missing)} missing): one entry per tensor.")
    for name in names:
        value = table[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise RequestError(f"{path} gives {name} the sparsity {value!r}, but it must be at least 0 and below 1.")
    return {name: float(table[name]) for name in names}


def allocation_report(given: str) -> Path | None:
    """The file of `file:PATH` where that is the report of a run; `read_allocation` has read it."""
    path = Path(given.removeprefix(FILE)).expanduser()
    if not given.startswith(FILE):
        return None
    return path if "request" in json.loads(path.read_text(encoding="utf-8")) else None


def _table(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"--allocate file:{path} cannot be read ({error.strerror}): give an allocation.") from error
    except ValueError as error:
        raise RequestError(f"{path} is no JSON ({error}): give an allocation or a prune_report.json.") from error
    if isinstance(document, dict) and isinstance(document.get("allocation"), dict):
        document = document["allocation"]
    table = document.get("sparsity") if isinstance(document, dict) else None
    if not isinstance(table, dict):
        raise RequestError(f"{path} holds no table: it needs {{'sparsity': {{'tensor name': 0.5, …}}}}, or a report.")
    if document.get("schema_version", _SCHEMA_VERSION) != _SCHEMA_VERSION:
        raise RequestError(f"{path} has schema_version {document['schema_version']!r}; this version reads 1.")
    return table
