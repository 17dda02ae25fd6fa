"""The dense model that the report of a pruned one tells of: whether the one at hand is still that. No torch here."""

from __future__ import annotations

from pathlib import Path

from prune_cli.checkpoint.file_names import REPORT_JSON
from prune_cli.checkpoint.inputs import check_inputs, hash_files, told_change
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.report.read import read_report


def check_dense(pruned: Path, dense: Path, *, allow: bool) -> tuple[str, ...]:
    """Hold the weights in `dense` against those that the report in `pruned` has hashes of, as `check_inputs` does.

    Nothing where there is no report.
    """
    report = pruned / REPORT_JSON
    return check_inputs(str(report), *_hashes(pruned, dense), allow=allow) if report.is_file() else ()


def change_of_dense(pruned: Path, dense: Path) -> str | None:
    """In words, what of the weights in `dense` is no longer as the report in `pruned` says."""
    return told_change(REPORT_JSON, *_hashes(pruned, dense)) if (pruned / REPORT_JSON).is_file() else None


def _hashes(pruned: Path, dense: Path) -> tuple[dict[str, str], dict[str, str]]:
    return dict(read_report(pruned).report.model.files), hash_files(dense, Checkpoint.open(dense).files)


def revision_of_dense(pruned: Path, dense: str) -> str | None:
    """The commit of the hub model `dense` that the report in the folder `pruned` says was pruned, if it says so."""
    if not (pruned / REPORT_JSON).is_file():
        return None
    model = read_report(pruned).report.model
    return model.revision if model.given == dense else None
