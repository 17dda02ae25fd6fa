"""`check --baseline`: the figures of an earlier run's report as rules for this one. No torch here."""

from __future__ import annotations

from pathlib import Path

from prune_cli.checkpoint.file_names import REPORT_JSON
from prune_cli.errors import RequestError
from prune_cli.report.read import read_report

# Devices and versions differ in later digits; so much more perplexity than the baseline's is no loss.
TOLERANCE = 0.005


def limits_of(baseline: str, target: str) -> dict[str, str]:
    """Rules by option, as typed: no more perplexity and bytes, no less sparsity than the report `baseline` has.

    Raises RequestError for no report, and where the report of `target` has its perplexity from another text.
    """
    report = read_report(baseline).report
    limits = {"--max-size": f"{report.totals.bytes_after}B"}
    if report.totals.pruned_parameters:
        limits["--min-sparsity"] = _plain(report.totals.sparsity_of_pruned)
    if report.evaluation is not None:
        _check_same_text(report.evaluation.text.sha256, baseline, target)
        limits["--max-perplexity"] = _plain(report.evaluation.after.perplexity * (1 + TOLERANCE))
    return limits


def _plain(value: float) -> str:
    """All digits that matter, never with an exponent."""
    return f"{value:.12f}"


def _check_same_text(sha256: str, baseline: str, target: str) -> None:
    path = Path(target).expanduser()
    if not path.is_file() and not (path / REPORT_JSON).is_file():
        return  # measured on the text of --data, which the user says
    other = read_report(path).report.evaluation
    if other is not None and other.text.sha256 != sha256:
        raise RequestError(
            f"The perplexities of {baseline} and {target} are of different texts: prune with the same --eval, "
            "--eval-windows and --seed, or say --max-perplexity yourself."
        )
