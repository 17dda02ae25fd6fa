"""The numbers of a report, each with what it was before: written here once for terminal, Markdown, HTML and card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_cli.report.format import change_of, count_of, duration, percent, size, text_name

if TYPE_CHECKING:
    from prune_cli.report.memory import MemoryPlan
    from prune_cli.report.types import Evaluation, EvaluationReport, Report, StructureReport, Totals

FIGURES = ("", "before", "after", "change")
# From so much more loss on, in nats per token: 0.1 is 10.5 % more perplexity, 0.5 is 65 %.
ALARMS = ((0.5, "a heavy loss"), (0.1, "a clear loss"))
OF_THE_RUN = ("Time of the run", "Peak memory")


@dataclass(frozen=True)
class Figure:
    """One number of a run; `before` and `change` (in words) where there is something to compare with.

    `alarm` says in a word how bad a change for the worse is, where it is one that readers should not miss.
    """

    name: str
    after: str
    before: str | None = None
    change: str | None = None
    alarm: str | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """A row of a table with the columns `FIGURES`."""
        return self.name, self.before or "", self.after, self._change()

    def in_a_line(self) -> str:
        before = f"{self.before} → " if self.before else ""
        change = f" ({self._change()})" if self.change else ""
        return before + self.after + change

    def _change(self) -> str:
        return ", ".join(part for part in (self.change, self.alarm) if part)


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


def _loss(measured: Evaluation) -> str:
    return f"{measured.loss:.4f} ± {measured.loss_standard_error:.4f}"


def _perplexity(measured: Evaluation) -> str:
    """With the standard error that follows from that of its logarithm, the loss."""
    return f"{measured.perplexity:.2f} ± {measured.perplexity * measured.loss_standard_error:.2f}"


def _of_quality(evaluation: EvaluationReport | None) -> Sequence[Figure]:
    if evaluation is None:
        return []
    before, after = evaluation.before, evaluation.after
    more, alarm = after.loss - before.loss, alarm_of(after.loss - before.loss)
    change, name = change_of(before.perplexity, after.perplexity), f"Perplexity on {text_name(evaluation.text)}"
    return [
        Figure(name, _perplexity(after), _perplexity(before), change, alarm),
        Figure("Loss, nats per token", _loss(after), _loss(before), f"{more:+.4f}", alarm),
    ]


def alarm_of(more: float) -> str | None:
    """In a word, how bad `more` loss is, in nats per token; None for what a reader may pass over."""
    return next((word for least, word in ALARMS if more >= least), None)


def _memory(report: Report) -> str:
    host, device = size(report.peak_host_bytes), report.peak_device_bytes
    peak = host if device is None else f"{host}, device {size(device)}"
    return peak if report.memory is None else f"{peak} ({fitted_into(report.memory)})"


def fitted_into(memory: MemoryPlan) -> str:
    """'limit 2.00 GB; hidden states of a model beyond 64.0 MB wait in files'."""
    limit, device = memory.host_limit, memory.device_limit
    parts = [] if limit is None else [f"{'limit' if memory.asked else 'free'} {size(limit)}"]
    if device is not None and device != limit:
        parts.append(f"{size(device)} of the device")
    if memory.hidden_states is not None:
        where = "for another pass over the weights" if memory.device_estimate is not None else "in files"
        beyond = f" beyond {size(memory.hidden_states)}" if memory.hidden_states else ""
        parts.append(f"hidden states of a model{beyond} wait {where}")
    return "; ".join(parts)
