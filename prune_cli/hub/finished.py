"""What push must know of a finished output, whichever command wrote it and its report. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prune_cli.checkpoint.file_names import RECOVER_JSON, REPORT_JSON
from prune_cli.errors import RequestError
from prune_cli.recovery.read import read_recovery
from prune_cli.recovery.report import RecoveryReport
from prune_cli.report.format import method_name, percent
from prune_cli.report.read import read_report
from prune_cli.report.types import PrunedModel, Report


@dataclass(frozen=True)
class Finished:
    """`hashes` are the sha256 that each weight file may have; `paths` the local ones that the report names."""

    model: PrunedModel
    message: str
    hashes: Mapping[str, frozenset[str]]
    paths: frozenset[str]


def read_finished(out: Path) -> Finished:
    """Of the output in the folder `out`; raises RequestError where it has no report, or one that does not fit."""
    folder = out.expanduser()
    if (folder / RECOVER_JSON).is_file() and not (folder / REPORT_JSON).is_file():
        recovery = read_recovery(folder / RECOVER_JSON)
        return Finished(
            recovery.model, _recovered(recovery), recovery.output.hashes(), frozenset(_local(_said_in(recovery)))
        )
    saved = read_report(out)
    if saved.path.parent != folder:
        raise RequestError(f"{out} is a file: give the folder of the pruned model.")
    report = saved.report
    return Finished(report.model, _pruned(report), report.output.hashes(), frozenset(_local(_named_in(report))))


def _pruned(report: Report) -> str:
    sparsity = report.totals.sparsity_of_pruned
    return (
        f"{_name(report.model)} pruned with {method_name(report)}, {100 * sparsity:.4g} % of the pruned tensors are "
        f"zero (prune-cli {report.tool.version})"
    )


def _recovered(report: RecoveryReport) -> str:
    won_back = report.losses.won_back
    gain = "" if won_back is None else f", {percent(won_back)} of the loss's increase is gone"
    how = "block by block" if report.training is None else "end to end"
    return f"{_name(report.model)} recovered {how}{gain} (prune-cli {report.tool.version})"


def _name(model: PrunedModel) -> str:
    return model.given.rstrip("/").rpartition("/")[2]


def _named_in(report: Report) -> Iterator[str | None]:
    request, texts = report.request, (report.calibration, report.evaluation and report.evaluation.text)
    yield from (request.calibration, request.eval, request.statistics, request.save_statistics, request.config)
    yield from (str(request.out), request.allocate.removeprefix("file:"), report.output.folder)
    yield from (text.source for text in texts if text)
    if report.model.revision is None:
        yield from (report.model.given, request.model)


def _said_in(report: RecoveryReport) -> Iterator[str | None]:
    request = report.request
    yield from (request.calibration, request.eval, request.store, str(request.out), report.output.folder)
    yield from (report.calibration.text.source, report.losses.text.source)
    for model, given in ((report.model, request.model), (report.teacher, request.teacher)):
        if model.revision is None:
            yield from (model.given, given)


def _local(named: Iterable[str | None]) -> Iterator[str]:
    """Those that hold more than a name."""
    for path in named:
        if path and "/" in path.strip("/") and not path.startswith("hf:"):
            yield path
