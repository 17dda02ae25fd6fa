"""From reports to what the page tells: sentences, figures and rows, all of them text. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prune_cli.report.compared_experts import compared_table
from prune_cli.report.continuations import rows_of
from prune_cli.report.figures import Figure, figures_of
from prune_cli.report.format import change_of, method_name, percent, size, text_name
from prune_cli.report.structure_tables import NOT_LOADED, BlockTable, block_table, not_loaded_rows
from prune_cli.report.tasks import header_of
from prune_cli.report.tasks import rows_of as tasks_of
from prune_cli.request.command_line import command_of

if TYPE_CHECKING:
    from prune_cli.report.types import Environment, EvaluationReport, Report, StructureReport, TextReport, Totals
    from prune_cli.request.request import PruneRequest


@dataclass(frozen=True)
class Run:
    """What one report tells. `papers` and the rows are (name, text) pairs."""

    label: str
    title: str
    lead: Sequence[str]
    figures: Sequence[Figure]
    gain: str
    warnings: Sequence[str]
    command: str
    papers: Sequence[str]
    kept: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, str]]
    blocks: BlockTable | None
    compared: BlockTable | None
    tasks: BlockTable | None
    said: BlockTable | None
    not_loaded: BlockTable | None


def tell(report: Report, label: str) -> Run:
    """The story of one report, called `label` where several stand side by side."""
    return Run(
        label=label,
        title=f"{report.model.name} pruned with {method_name(report)}",
        lead=_lead(report),
        figures=figures_of(report),
        gain=report.gain,
        warnings=[*report.warnings, *(report.structure.notes if report.structure else [])],
        command=command_of(exact_request(report)),
        papers=list(dict.fromkeys(report.method.papers)),
        kept=_kept(report),
        settings=_settings(report),
        files=_files(report),
        blocks=None if report.structure is None else block_table(report.structure),
        compared=_compared(report.structure),
        tasks=None if report.tasks is None else BlockTable(header_of(report.tasks), tasks_of(report.tasks)),
        said=_said(report),
        not_loaded=BlockTable(NOT_LOADED, not_loaded_rows(report.not_loaded)) if report.not_loaded else None,
    )


def _compared(structure: StructureReport | None) -> BlockTable | None:
    return None if structure is None or structure.compared is None else compared_table(structure.compared)


def _said(report: Report) -> BlockTable | None:
    rows = rows_of(report.continuations)
    return BlockTable(("prompt", "dense", "pruned", ""), rows) if rows else None


def side_by_side(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Each figure that any run has, with its text for every run."""
    names = dict.fromkeys(figure.name for run in runs for figure in run.figures)
    found = [{figure.name: figure for figure in run.figures} for run in runs]
    return [(name, [row[name].in_a_line() if name in row else "–" for row in found]) for name in names]


def labels_of(reports: Sequence[Report]) -> list[str]:
    """A short name for each: the folder it was written to, numbered where two are alike."""
    names = [report.output.folder.rstrip("/").rpartition("/")[2] or "report" for report in reports]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return labels


def remarks_on(reports: Sequence[Report]) -> list[str]:
    """What forbids to compare some of the figures."""
    remarks = []
    if len({_key(report.model.files) for report in reports}) > 1:
        remarks.append("The reports are of different models: compare how much changed, not the values.")
    texts = {report.evaluation.text.sha256 for report in reports if report.evaluation is not None}
    if len(texts) > 1:
        remarks.append("Perplexity was measured on different texts: those values cannot be compared.")
    calibrations = {report.calibration.sha256 for report in reports if report.calibration is not None}
    if len(calibrations) > 1:
        remarks.append("Output errors were measured on different calibration texts: they compare only roughly.")
    return remarks


def _key(files: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(files.items()))


def _lead(report: Report) -> list[str]:
    return [*_what_was_removed(report), _what_it_cost(report.evaluation), _what_it_takes(report.totals)]


def _what_was_removed(report: Report) -> Iterator[str]:
    totals, structure = report.totals, report.structure
    if structure is not None:
        yield (
            f"{structure.units_after} of {structure.units_before} {structure.unit} are left; "
            f"{percent(structure.removed_shares['parameters'])} of the parameters are gone."
        )
    if structure is None or totals.pruned_parameters:
        pruned = sum(tensor.action == "pruned" for tensor in report.tensors)
        yield (
            f"{percent(totals.sparsity_of_pruned)} of the weights in the {pruned} pruned tensors are zero, "
            f"{percent(totals.sparsity_of_model)} of the whole model."
        )


def _what_it_cost(evaluation: EvaluationReport | None) -> str:
    if evaluation is None:
        return "What that costs was not measured: --eval SOURCE of prune, or prune-cli eval, does."
    before, after = evaluation.before.perplexity, evaluation.after.perplexity
    name = text_name(evaluation.text)
    return f"Perplexity on {name} went from {before:.2f} to {after:.2f} ({change_of(before, after)})."


def _what_it_takes(totals: Totals) -> str:
    before, after = totals.bytes_before, totals.bytes_after
    change = change_of(before, after)
    if change == "as before":
        return f"The weights take {size(after)} on disk, as before."
    return f"The weights take {size(after)} on disk, {size(before)} before ({change})."


def exact_request(report: Report) -> PruneRequest:
    """What was asked for, with the commit that was found, and without what belongs to that one run."""
    revision = report.model.revision or report.request.revision
    return replace(report.request, revision=revision, resume=False, overwrite=False, allow_changed_inputs=False)


def _kept(report: Report) -> list[tuple[str, str]]:
    reasons = Counter(tensor.reason for tensor in report.tensors if tensor.action == "kept")
    return [(reason, str(number)) for reason, number in sorted(reasons.items())]


def _settings(report: Report) -> list[tuple[str, str]]:
    environment, model = report.environment, report.model
    calibration = report.calibration
    rows = [
        ("Model", model.given + (f" at {model.revision}" if model.revision else "")),
        ("Architecture", model.architecture),
        ("Method", f"{method_name(report)}: {report.method.summary}"),
        ("Options", ", ".join(f"{key} = {value}" for key, value in report.method.options.items()) or "none"),
        *([("Allocation", report.allocation.strategy)] if report.allocation else []),
        *([("Asked for", report.structure.asked)] if report.structure else []),
        ("Calibration", "none needed" if calibration is None else _text(calibration)),
    ]
    if report.evaluation is not None:
        rows.append(("Evaluation", f"{_text(report.evaluation.text)} {report.evaluation.protocol}"))
    rows += [
        ("Made", f"{report.created} by {report.tool.name} {report.tool.version}"),
        ("Device", f"{environment.device}, {environment.compute_dtype}, {_threads(environment)}"),
        ("System", f"{environment.platform}, Python {environment.python}"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in environment.versions.items())),
    ]
    return rows


def _threads(environment: Environment) -> str:
    policy = environment.omp_wait_policy
    return f"{environment.threads} threads" + (f", OMP_WAIT_POLICY={policy}" if policy else "")


def _text(text: TextReport) -> str:
    return f"{text.source}: {text.samples} windows of {text.seq_len} tokens. {text.protocol}"


def _files(report: Report) -> list[tuple[str, str]]:
    return sorted(report.output.files.items())
