"""Inputs by their sha256, those of now held against those that a report, a recipe or a file was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prune_cli.errors import RequestError

# Names of inputs beside weight files, which go by their own.
CALIBRATION, EVALUATION = "calibration tokens", "evaluation tokens"
ALLOCATION_TABLE, STATISTICS_FILE, KEEP_LIST = "allocation table", "statistics file", "list of experts"
ALLOW = "--allow-changed-inputs"
_SHOWN = 12
_FILE_THREADS = 2


def changed(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The names in `recorded` that `found` lacks or has with another hash."""
    return [name for name, sha256 in recorded.items() if found.get(name) != sha256]


def told_change(owner: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """What `changed` finds, in words without a full stop; `owner` holds the hashes and is called as the user does."""
    names = changed(recorded, found)
    if not names:
        return None
    there, now = recorded[names[0]][:_SHOWN], found.get(names[0], "")[:_SHOWN]
    what = f"{names[0]} (sha256 {there}… then, {f'{now}… now' if now else 'and it is not there now'})"
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{owner} was made with other inputs than these: {what}{more}"


def check_inputs(owner: str, recorded: Mapping[str, str], found: Mapping[str, str], *, allow: bool) -> tuple[str, ...]:
    """Nothing where all that is `recorded` is as it was; else a warning, or without `allow` a RequestError."""
    message = told_change(owner, recorded, found)
    if message is None:
        return ()
    if allow:
        return (f"{message}; {ALLOW} let that pass.",)
    raise RequestError(f"{message}. Give the same ones, or add {ALLOW} to go on with these.")


def hash_files(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """sha256 of each of `files` in `folder`."""
    with ThreadPoolExecutor(max_workers=_FILE_THREADS) as pool:
        return dict(zip(files, pool.map(lambda file: hash_file(folder / file), files), strict=True))


def hash_file(path: Path) -> str:
    """Its sha256."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
