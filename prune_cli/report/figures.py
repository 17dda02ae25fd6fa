"""The numbers of a report, each with what it was before: written here once for terminal, Markdown, HTML and card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_cli.report.format import change_of, count_of, duration, percent, size, text_name

if TYPE_CHECKING:
    from prune_cli.report.types import Evaluation, EvaluationReport, Report, StructureReport, Totals

FIGURES = ("", "before", "after", "change")
OF_THE_RUN = ("Time of the run", "Peak memory")


@dataclass(frozen=True)
class Figure:
    """One number of a run; `before` and `change` (in words) where there is something to compare with."""

    name: str
    after: str
    before: str | None = None
    change: str | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """A row of a table with the columns `FIGURES`."""
        return self.name, self.before or "", self.after, self.change or ""

    def in_a_line(self) -> str:
        before = f"{self.before} → " if self.before else ""
        change = f" ({self.change})" if self.change else ""
        return before + self.after + change


def figures_of(report: Report) -> list[Figure]:
    totals = report.totals
    structure = report.structure
    return [
        *(_of_sparsity(totals) if totals.pruned_parameters else []),
        *(_of_structure(structure) if structure is not None else []),
        _changed("Weights on disk", totals.bytes_before, totals.bytes_after, size),
        *_as_sparse(totals.bytes_as_sparse),
        *_of_quality(report.evaluation),
        Figure(OF_THE_RUN[0], duration(report.seconds)),
        Figure(OF_THE_RUN[1], _memory(report)),
    ]


def _of_sparsity(totals: Totals) -> list[Figure]:
    parameters = totals.parameters
    left = parameters - round(totals.sparsity_of_model * parameters)
    return [
        Figure("Zeros in the pruned tensors", percent(totals.sparsity_of_pruned)),
        Figure("Zeros in the whole model", percent(totals.sparsity_of_model)),
        Figure("Weights that are not zero", count_of(left), change=f"of {count_of(parameters)}"),
    ]


def _as_sparse(count: int | None) -> Sequence[Figure]:
    return [] if count is None else [Figure("With --format sparse, about", size(count))]


def _of_structure(structure: StructureReport) -> list[Figure]:
    before, after = structure.before, structure.after
    figures = [
        Figure(structure.unit.capitalize(), str(structure.units_after), str(structure.units_before)),
        _changed("Parameters", before.parameters, after.parameters, count_of),
        _changed("Multiplications per token", before.macs_per_token, after.macs_per_token, count_of),
    ]
    if before.kv_cache_bytes_per_token and after.kv_cache_bytes_per_token:
        cache = before.kv_cache_bytes_per_token, after.kv_cache_bytes_per_token
        figures.append(_changed("Cache per token", *cache, size))
    return figures


def _changed(name: str, before: float, after: float, text: Callable[[float], str]) -> Figure:
    return Figure(name, text(after), text(before), change_of(before, after))


def _with_error(measured: Evaluation) -> str:
    return f"{measured.loss:.4f} ± {measured.loss_standard_error:.4f}"


def _of_quality(evaluation: EvaluationReport | None) -> Sequence[Figure]:
    if evaluation is None:
        return []
    before, after = evaluation.before, evaluation.after
    more = after.loss - before.loss
    return [
        _changed(f"Perplexity on {text_name(evaluation.text)}", before.perplexity, after.perplexity, "{:.2f}".format),
        Figure("Loss, nats per token", _with_error(after), _with_error(before), f"{more:+.4f}"),
    ]


def _memory(report: Report) -> str:
    host, device = size(report.peak_host_bytes), report.peak_device_bytes
    return host if device is None else f"{host}, device {size(device)}"
