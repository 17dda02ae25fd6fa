"""Whether OUT can be made where it is asked for, told before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from prune_cli.checkpoint.file_names import CONFIG_FILE, REPORT_JSON, partial_folder
from prune_cli.errors import RequestError

_SPARE_BYTES = 1 << 26


def check_output(out: Path, source: Path | None, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that cannot be made, before any work: taken, or inside `source`, the model's folder."""
    resolved = out.expanduser().resolve()
    model = source.resolve() if source is not None else None
    if model is not None and (resolved == model or model in resolved.parents or resolved in model.parents):
        raise RequestError(f"{out} and the model's folder {model} lie in each other: choose another OUT.")
    if os.path.lexists(out) and not overwrite:
        raise RequestError(f"{out} exists already: choose another OUT, or add --overwrite to replace it.")
    if os.path.lexists(out) and not _ours_to_replace(out):
        raise RequestError(f"{out} is no checkpoint folder, so --overwrite does not touch it: choose another OUT.")
    partial = partial_folder(out)
    if partial.exists() and not resume and not overwrite:
        raise RequestError(
            f"{partial} holds an interrupted run: add --resume to continue it, or --overwrite to start again."
        )
    existing = _nearest_folder(out)
    if not os.access(existing, os.W_OK):
        raise RequestError(f"{existing} cannot be written to: choose another OUT.")


def check_space(out: Path, nbytes: int) -> None:
    """Refuse an output of `nbytes` for which the disk has no space; an interrupted run has taken its space already."""
    if partial_folder(out).exists():
        return
    existing = _nearest_folder(out)
    free = shutil.disk_usage(existing).free
    if free < nbytes + _SPARE_BYTES:
        raise RequestError(
            f"{existing} has {free / 1e6:,.0f} MB free, but the output needs {nbytes / 1e6:,.0f} MB and "
            f"{_SPARE_BYTES / 1e6:,.0f} MB are kept in reserve: make space, or choose an OUT on another disk."
        )


def _nearest_folder(out: Path) -> Path:
    return next(parent for parent in out.expanduser().resolve().parents if parent.exists())


def _ours_to_replace(out: Path) -> bool:
    if not out.is_dir() or out.is_symlink():
        return False
    names = {path.name for path in out.iterdir()}
    return not names or CONFIG_FILE in names or REPORT_JSON in names
