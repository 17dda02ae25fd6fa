"""Rows of structured text files, and the column of rows that holds the text."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from calibration.errors import CalibrationError
from calibration.loading import Row, each_row, explained, load_file

Chat = list[dict[str, Any]]
Document = str | Chat

LOADERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_GUESSED_COLUMNS = ("messages", "text", "content")


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON, CSV or Parquet file in order. Raises CalibrationError if it cannot be read as that."""
    loader = LOADERS[path.suffix.lower()]
    failure, remedy = f"{path} cannot be read as {loader}", f"mend the file, or name it .txt if it is no {loader}"
    # datasets would put the working folder before a relative path unescaped, and it stumbles over "..".
    full = str(path.parent.resolve() / path.name)
    if "::" in full:
        raise CalibrationError(f"{path} has :: in its path, which `datasets` takes for an address: rename or move it.")
    with explained(failure, remedy):
        if path.stat().st_size == 0:
            return
        # A streamed file needs no cache, but datasets leaves locks there, and the user's may be read-only.
        with tempfile.TemporaryDirectory() as cache:
            options = {"streaming": True, "split": "train", "cache_dir": cache, **_options(path)}
            rows = load_file(str(path), loader, data_files=glob.escape(full), **options)
    yield from each_row(rows, failure, remedy)


def _options(path: Path) -> dict[str, Any]:
    if LOADERS[path.suffix.lower()] != "csv":
        return {}
    # pandas would take "NA" and empty fields for missing text.
    as_typed = {"keep_default_na": False, "na_filter": False}
    return {**as_typed, "delimiter": "\t" if path.suffix.lower() == ".tsv" else ","}


def column_of(where: str, rows: Iterable[Row], column: str | None, prefix: str) -> Iterator[Document]:
    """The documents in one column, guessed if None; a user names a column by `prefix` and its name.

    Raises CalibrationError, naming `where`, if the column holds no text.
    """
    for number, row in enumerate(rows, start=1):
        column = column or _guess_column(where, row, prefix)
        if column not in row:
            raise CalibrationError(f"{where} has no column {column!r}: use one of {', '.join(row)}.")
        value = row[column]
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(message, dict) for message in value)):
            if value:
                yield value
        elif value is not None:
            raise CalibrationError(
                f"Row {number} of {where} holds {type(value).__name__} in column {column!r}, but text or chat messages "
                f"are expected: mend the row or name another column, as {prefix}COLUMN."
            )


def _guess_column(where: str, row: Row, prefix: str) -> str:
    for name in _GUESSED_COLUMNS:
        if name in row:
            return name
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise CalibrationError(
            f"{where} has the columns {', '.join(row)}: name the one with the text, such as "
            f"{prefix}{(texts or list(row) or ['COLUMN'])[0]}."
        )
    return texts[0]
