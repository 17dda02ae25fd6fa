"""The report as a page that a person reads: prune_report.md."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from prune_cli.report.compared_experts import compared_table
from prune_cli.report.continuations import as_markdown
from prune_cli.report.figures import FIGURES, figures_of
from prune_cli.report.format import method_name, percent, table
from prune_cli.report.structure_tables import BLOCKS, NOT_LOADED, block_rows, not_loaded_rows, share_text
from prune_cli.report.tasks import tasks_as_markdown
from prune_cli.request.request import request_as_json

if TYPE_CHECKING:
    from prune_cli.report.types import Report, StructureReport, TensorReport


def to_markdown(report: Report) -> str:
    structure = report.structure
    what = [_pruned(report)] if structure is None else [_blocks(structure)]
    tensors = [_by_reason(report, action) for action in ("kept", "narrowed", "refitted", "removed")]
    parts = [
        _summary(report),
        _figures(report),
        _gain(report),
        _evaluation(report),
        tasks_as_markdown(report.tasks),
        as_markdown(report.continuations),
        _how(report),
        *what,
    ]
    parts += [_not_loaded(report), *tensors]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(report: Report) -> str:
    revision = f" at `{report.model.revision}`" if report.model.revision else ""
    structure = report.structure
    rows = [
        ("model", f"`{report.model.given}`{revision}"),
        ("architecture", str(report.model.architecture)),
        ("method", f"{method_name(report)}: {report.method.summary} ({'; '.join(report.method.papers)})"),
        ("allocation", _allocation(report))
        if structure is None
        else ("asked for", f"{structure.asked}; removed {share_text(structure)}"),
    ]
    return "# Pruning report\n\n" + table(("", ""), rows)


def _figures(report: Report) -> str:
    notes = "" if report.structure is None else "".join(f"\n\n{note}" for note in report.structure.notes)
    return "## Before and after\n\n" + table(FIGURES, [figure.cells() for figure in figures_of(report)]) + notes


def _not_loaded(report: Report) -> str:
    rows = [(f"`{name}`", *rest) for name, *rest in not_loaded_rows(report.not_loaded)]
    return "## Not loaded by transformers\n\n" + table(NOT_LOADED, rows) if rows else ""


def _blocks(structure: StructureReport) -> str:
    blocks = "## Blocks\n\n" + table(BLOCKS, block_rows(structure.blocks))
    if structure.compared is None:
        return blocks
    compared = compared_table(structure.compared)
    return f"{blocks}\n\n## Experts by text\n\n" + table(compared.header, compared.rows)


def _allocation(report: Report) -> str:
    assert report.allocation is not None
    values = report.allocation.sparsity.values()
    strategy = report.allocation.strategy
    if strategy == "uniform" or not values:
        return strategy
    return f"{strategy}: {percent(min(values))} to {percent(max(values))} per tensor, as the table below says"


def _gain(report: Report) -> str:
    warnings = "".join(f"\n\n**Warning:** {warning}" for warning in report.warnings)
    return f"## What it gains\n\n{report.gain}{warnings}"


def _evaluation(report: Report) -> str:
    if report.evaluation is None:
        return ""
    before, after, text = report.evaluation.before, report.evaluation.after, report.evaluation.text
    rows = [
        (name, f"{e.perplexity:.4f}", f"{e.loss:.5f} ± {e.loss_standard_error:.5f}")
        for name, e in (("before", before), ("after", after))
    ]
    return (
        "## Perplexity\n\n"
        + table(("", "perplexity", "loss (nats per token)"), rows)
        + f"\n\nText: {text.source}, {text.samples} windows of {text.seq_len} tokens ({text.protocol}); "
        f"sha256 of the tokens {text.sha256}. {report.evaluation.protocol[0].upper()}{report.evaluation.protocol[1:]}."
    )


def _how(report: Report) -> str:
    lines = [f"- {key}: {value}" for key, value in asdict(report.environment).items() if key != "versions"]
    lines += [f"- {name} {number}" for name, number in report.environment.versions.items()]
    if report.calibration is not None:
        text = report.calibration
        lines.append(
            f"- calibration: {text.source}, {text.samples} x {text.seq_len} tokens, seed {text.seed}; {text.protocol}"
        )
        lines.append(f"- sha256 of the calibration tokens: {text.sha256}")
    asked = request_as_json(report.request).items()
    request = "\n".join(f"- {key}: {value}" for key, value in asked if value not in (None, (), [], {}))
    return "## Request\n\n" + request + "\n\n## Setting\n\n" + "\n".join(lines)


def _pruned(report: Report) -> str:
    rows = [
        (
            f"`{t.name}`",
            str(list(t.shape)),
            t.dtype,
            percent(t.asked_sparsity),
            percent(t.sparsity),
            "–" if t.output_error is None else f"{t.output_error:.4f}",
        )
        for t in report.tensors
        if t.action == "pruned"
    ]
    note = "Sparsity is counted in the written files. "
    if report.calibration is not None and report.output_error_rows is not None:
        exact = report.output_error_rows >= report.calibration.tokens
        how = (
            "on all calibration tokens"
            if exact
            else f"estimated from a random sketch of {report.output_error_rows} rows"
        )
        note += f"Output error is ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖², {how}."
    header = ("tensor", "shape", "dtype", "asked", "sparsity", "output error")
    return "## Pruned tensors\n\n" + note + "\n\n" + table(header, rows)


def _by_reason(report: Report, action: str) -> str:
    """The tensors that were not pruned, those with the same reason in one row."""

    def reason(tensor: TensorReport) -> str:
        return tensor.reason.partition(" (")[0] if report.structure is not None else tensor.reason

    chosen = sorted((t for t in report.tensors if t.action == action), key=reason)
    rows = []
    for why, group in groupby(chosen, key=reason):
        names = [f"`{tensor.name}`" for tensor in group]
        rows.append((why, str(len(names)), ", ".join(names)))
    title = f"## {action.capitalize()} tensors"
    return f"{title}\n\n" + table(("reason", "tensors", "names"), rows) if rows else ""
