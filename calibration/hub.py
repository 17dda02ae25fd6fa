"""Data sets on the hub: streamed row by row, or fetched whole as the papers' protocols need them."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from calibration.errors import CalibrationError
from calibration.loading import Row, each_row, explained, import_datasets, load_dataset

_REMEDY = "check the name and the network; builtin and local files need no network"
_SECONDS_TO_CONNECT = 10


def hub_rows(repo: str, config: str | None = None, **options: Any) -> Iterator[Row]:
    """The rows of a data set as they stream in. Raises CalibrationError, in the midst of reading too."""
    rows = _load(repo, config, streaming=True, **options)
    yield from each_row(rows, f"{repo} could not be fetched", _REMEDY)


def hub_table(repo: str, config: str | None = None, **options: Any) -> Any:
    """A data set, downloaded whole: a sequence of rows. Raises CalibrationError."""
    return _load(repo, config, **options)


def _load(repo: str, config: str | None, **options: Any) -> Any:
    with explained(f"{repo} could not be fetched", _REMEDY):
        _refuse_local(repo)
        _check_reachable(repo)
        return load_dataset(repo, repo, config, **options)


def _refuse_local(repo: str) -> None:
    """`datasets` would sooner read a folder of that name, or, for the name of a format, whatever files lie around."""
    formats = import_datasets(repo).packaged_modules._PACKAGED_DATASETS_MODULES
    if Path(repo).is_dir():
        raise CalibrationError(
            f"There is a folder {repo} here, which hides the data set of that name on the hub: "
            f"run from another folder, or give ./{repo} to read the folder."
        )
    if repo in formats:
        raise CalibrationError(f"{repo} is a format, no data set on the hub: write hf:OWNER/NAME, or a file's path.")


def _check_reachable(repo: str) -> None:
    """Fail at once where the hub cannot be reached: `datasets` would try again and again for half a minute or more."""
    config = import_datasets(repo).config
    endpoint = urlsplit(config.HF_ENDPOINT)
    host, port = endpoint.hostname, endpoint.port or (80 if endpoint.scheme == "http" else 443)
    proxies = {"all", endpoint.scheme} & urllib.request.getproxies().keys()
    proxied = bool(proxies) and not urllib.request.proxy_bypass(host or "")
    if config.HF_HUB_OFFLINE or proxied:
        return
    try:
        socket.create_connection((host, port), timeout=_SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise CalibrationError(
            f"{repo} could not be fetched ({config.HF_ENDPOINT} does not answer: {error.strerror or error}): check the "
            "network, or set HF_HUB_OFFLINE=1 if it was fetched before; builtin and local files need no network."
        ) from error
