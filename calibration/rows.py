"""Rows of structured text, read through `datasets`, which is imported only when a row is wanted."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calibration.errors import CalibrationError

Document = str | list[dict[str, Any]]
Row = dict[str, Any]

LOADERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_GUESSED_COLUMNS = ("messages", "text", "content")
_NETWORK = "check the name and the network; builtin and local files need no network"


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON, CSV or Parquet file in order. Raises CalibrationError if it cannot be read as that."""
    if path.stat().st_size == 0:
        return
    loader = LOADERS[path.suffix.lower()]
    # pandas would take "NA" and empty fields for missing text.
    options: dict[str, Any] = {"keep_default_na": False, "na_filter": False} if loader == "csv" else {}
    if path.suffix.lower() == ".tsv":
        options["delimiter"] = "\t"
    remedy = f"mend the file, or name it .txt if it is no {loader}"
    with _explained(f"{path} cannot be read as {loader}", remedy):
        rows = _load(loader, data_files=glob.escape(str(path)), split="train", streaming=True, **options)
    yield from _each(rows, f"{path} cannot be read as {loader}", remedy)


def hub_rows(repo: str, config: str | None = None, **options: Any) -> Iterator[Row]:
    """The rows of a data set on the hub as they stream in. Raises CalibrationError, in the midst of reading too."""
    with _explained(f"{repo} could not be fetched", _NETWORK):
        rows = _load(repo, config, streaming=True, **options)
    yield from _each(rows, f"{repo} could not be fetched", _NETWORK)


def hub_table(repo: str, config: str | None = None, **options: Any) -> Any:
    """A data set on the hub, downloaded whole: a sequence of rows. Raises CalibrationError."""
    with _explained(f"{repo} could not be fetched", _NETWORK):
        return _load(repo, config, **options)


def column_of(where: str, rows: Iterable[Row], column: str | None) -> Iterator[Document]:
    """The documents in one column, guessed if None. Raises CalibrationError, naming `where`, if it holds no text."""
    for number, row in enumerate(rows, start=1):
        column = column or _guess_column(where, row)
        if column not in row:
            raise CalibrationError(f"{where} has no column {column!r}: use one of {', '.join(row)}.")
        value = row[column]
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(message, dict) for message in value)):
            if value:
                yield value
        elif value is not None:
            raise CalibrationError(
                f"Row {number} of {where} holds {type(value).__name__} in column {column!r}, but text or chat messages "
                "are expected: mend the row or name another column by adding :COLUMN to the source."
            )


def _guess_column(where: str, row: Row) -> str:
    for name in _GUESSED_COLUMNS:
        if name in row:
            return name
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise CalibrationError(
            f"{where} has the columns {', '.join(row)}: name the one with the text by adding :COLUMN to the source, "
            f"such as :{(texts or list(row))[0]}."
        )
    return texts[0]


def _load(path: str, config: str | None = None, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"Reading {path} needs the package datasets: pip install datasets, or use builtin or a plain text file."
        ) from error
    return datasets.load_dataset(path, config, **options)


def _each(rows: Iterable[Row], failure: str, remedy: str) -> Iterator[Row]:
    rest = iter(rows)
    while True:
        with _explained(failure, remedy):
            row = next(rest, None)
        if row is None:
            return
        yield row


@contextmanager
def _explained(failure: str, remedy: str) -> Iterator[None]:
    """Turn whatever `datasets` and the many libraries under it raise into one sentence."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(f"{failure} ({reason}): {remedy}.") from error
