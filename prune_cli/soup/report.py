"""What a soup tells: one typed report, written into OUT as soup_report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

SCHEMA_VERSION = 1
SOUP_REPORT = "soup_report.json"


@dataclass(frozen=True)
class SoupInput:
    """One model: its share of the average, sha256 of its files, zeros in the tensors that are sparse in any model."""

    model: str
    revision: str | None
    weight: float
    files: Mapping[str, str]
    sparsity: float | None


@dataclass(frozen=True)
class SoupTensor:
    """One tensor of the output; `sparsity` is that of the written file, None where zeros cannot be counted."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Literal["averaged", "identical"]
    sparse: bool
    sparsity: float | None


@dataclass(frozen=True)
class SoupTotals:
    """Counts of tensors and weights, and the zeros of the output among the sparse tensors and among all."""

    tensors: int
    averaged: int
    sparse: int
    parameters: int
    sparse_parameters: int
    sparsity_of_sparse: float | None
    sparsity_of_model: float | None


@dataclass(frozen=True)
class SoupReport:
    """Everything about one average. Without an output (--dry-run) `output` is None and the sparsities are None."""

    schema_version: int
    tool: Mapping[str, str]
    created: str
    masks: str
    inputs: Sequence[SoupInput]
    output: Mapping[str, Any] | None
    totals: SoupTotals
    tensors: Sequence[SoupTensor]
    warnings: Sequence[str]
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


@cache
def soup_schema() -> dict[str, Any]:
    """The JSON Schema that every report of a soup satisfies."""
    return json.loads(resources.files("prune_cli.soup").joinpath("soup.schema.json").read_text(encoding="utf-8"))
