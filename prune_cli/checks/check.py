"""The story of `prune-cli check`: figures, then a verdict for every rule. No torch unless a model is measured."""

from __future__ import annotations

from dataclasses import replace

from prune_cli.checks.fields import told_fields
from prune_cli.checks.figures import figures_of_report
from prune_cli.checks.request import GateRequest, GateResult
from prune_cli.errors import RequestError
from prune_cli.progress import Progress, Silent
from prune_cli.report.read import read_report

_MEASURING = ("data", "against", "eval_windows", "seq_len", "revision")


def check(request: GateRequest, progress: Progress | None = None) -> GateResult:
    """Decide every rule. Raises RequestError where one cannot be decided, or where there is no rule at all."""
    progress = progress or Silent()
    if request.is_report:
        return _check_report(request)
    from prune_cli.checks.measuring import measure_figures

    measured = measure_figures(request, progress)
    verdicts = request.asked.decide(measured.figures)
    if not verdicts:
        raise RequestError(
            f"There is no rule, and {request.target} has no report to hold its files against: say one, as --max-size "
            "4GB, or with --against DENSE --max-perplexity-increase 5%."
        )
    return GateResult(
        target=request.target,
        source="measured",
        against=measured.against,
        text=measured.figures.text,
        passed=all(verdict.passed for verdict in verdicts),
        verdicts=verdicts,
        warnings=measured.warnings,
    )


def _check_report(request: GateRequest) -> GateResult:
    report = read_report(request.target)
    for name in _MEASURING:
        if getattr(request, name) is not None:
            raise RequestError(
                f"--{name.replace('_', '-')} is for measuring a model, and {request.target} is a report, whose figures "
                "are taken as they are: give the model's folder."
            )
    figures = replace(figures_of_report(report), told=told_fields(report.report))
    verdicts = request.asked.decide(figures)
    if not verdicts:
        raise RequestError("There is no rule: say one, as --max-perplexity-increase 5%.")
    return GateResult(
        target=request.target,
        source="report",
        against=report.report.model.given,
        text=figures.text,
        passed=all(verdict.passed for verdict in verdicts),
        verdicts=verdicts,
    )
