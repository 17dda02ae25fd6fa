"""Scores on tasks, beside those of the dense model: shown alike in terminal, Markdown, HTML and card."""

from __future__ import annotations

from prune_cli.report.format import percent, table
from prune_cli.report.task_scores import TaskScore, TaskScores

RECOVERY = "Recovery is the score over the dense model's, with its standard error over the examples."


def header_of(found: TaskScores) -> tuple[str, ...]:
    compared = () if found.against is None else ("dense", "change", "recovery")
    return ("task", "metric", "examples", "score", *compared)


def rows_of(found: TaskScores) -> list[tuple[str, ...]]:
    """A row for each metric of each task, under `header_of`."""
    rows = []
    for each in found.scores:
        examples = "–" if each.examples is None else f"{each.examples:,}"
        row = (each.task, each.metric, examples, _with_error(each.score, each.standard_error))
        if found.against is not None:
            difference = "–" if each.difference is None else f"{each.difference:+.4f}"
            row += (_with_error(each.against, each.against_standard_error), difference, _recovery(each))
        rows.append(row)
    return rows


def title_of(found: TaskScores) -> str:
    return f"{found.harness}" + (f", first {found.limit} examples" if found.limit else "")


def tasks_as_markdown(found: TaskScores | None) -> str:
    """A section, empty where no task was measured."""
    if found is None:
        return ""
    return f"## Tasks\n\n{table(header_of(found), rows_of(found))}\n\nMeasured by {title_of(found)}. {RECOVERY}"


def _recovery(each: TaskScore) -> str:
    if each.recovery is None:
        return "–"
    error = each.recovery_standard_error
    return percent(each.recovery) + ("" if error is None else f" ± {percent(error)}")


def _with_error(value: float | None, standard_error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" + (f" ± {standard_error:.4f}" if standard_error is not None else "")
