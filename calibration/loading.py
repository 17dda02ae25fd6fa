"""Reading through `datasets`, which is imported only when a row is wanted, with one sentence for all that can fail."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from calibration.errors import CalibrationError

Row = dict[str, Any]


def import_datasets(where: str) -> Any:
    """The package `datasets`; raises CalibrationError, naming the source `where`, if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"Reading {where} needs the package datasets: pip install 'prune-cli[data]', or use builtin or a "
            "plain text file."
        ) from error
    return datasets


def load_dataset(where: str, path: str, config: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset(path, config, **options)`, in the `explained` of whoever calls."""
    return import_datasets(where).load_dataset(path, config, **options)


def load_file(where: str, loader: str, **options: Any) -> Any:
    """`load_dataset` for a local file, without the visit to a server that counts every use of `datasets`."""
    config = import_datasets(where).config
    before = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return load_dataset(where, loader, **options)
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


def each_row(rows: Iterable[Row], failure: str, remedy: str) -> Iterator[Row]:
    """The rows, with what breaks in the midst of reading `explained`."""
    rest = iter(rows)
    while True:
        with explained(failure, remedy):
            row = next(rest, None)
        if row is None:
            return
        yield row


@contextmanager
def explained(failure: str, remedy: str) -> Iterator[None]:
    """Turn whatever `datasets` and the many libraries under it raise into one sentence: CalibrationError."""
    logger = logging.getLogger("datasets")
    level = logger.level
    # It would log the error as well, in words of its own.
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise CalibrationError(f"{failure} ({reason}): {remedy}.") from error
    finally:
        logger.setLevel(level)
