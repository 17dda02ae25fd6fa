"""Models and texts that a request names, looked at as far as headers and config.json go. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.errors import CalibrationError, no_tokenizer
from calibration.sources import Source as TextSource
from calibration.sources import parse_source
from calibration.stored_shape import check_stored, stored_shape
from prune_cli.checkpoint.config_file import POSITION_LIMITS, has_tokenizer, read_config
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import local_model
from prune_cli.errors import RequestError


@dataclass(frozen=True)
class LocalModel:
    """A checkpoint folder with sound headers, and its config.json as it stands."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def position_limit(self) -> int | None:
        """The longest sequence, where config.json itself names one."""
        text = self.config.get("text_config")
        where = text if isinstance(text, dict) else self.config
        return next((where[key] for key in POSITION_LIMITS if type(where.get(key)) is int and where[key] > 0), None)


def look_at_model(given: str, revision: str | None = None) -> LocalModel | None:
    """The model where it lies in a folder, None for one of the hub; raises RequestError for what is not sound."""
    source = local_model(given, revision)
    return None if source is None else LocalModel(Checkpoint.open(source.folder), read_config(source.folder))


def check_text(given: str, model: LocalModel | None, samples: int | None, seq_len: int | None) -> None:
    """Raise RequestError for a text that is not there, or that cannot give such samples to this model."""
    text = open_text(given)
    limit = model.position_limit if model is not None else None
    if seq_len is not None and limit is not None and seq_len > limit:
        raise RequestError(f"--seq-len is {seq_len}, but the model takes at most {limit} positions.")
    try:
        shape = stored_shape(text) if text.kind == "tokens" else None
        if shape is not None:
            check_stored(given, shape, samples, seq_len)
        elif text.kind != "tokens" and model is not None and not has_tokenizer(model.folder):
            raise no_tokenizer(given)
    except CalibrationError as error:
        raise RequestError(str(error)) from error


def open_text(text: str) -> TextSource:
    """The source that `text` names; raises RequestError where there is none such."""
    if not text.strip():
        raise RequestError("The text to read is an empty name: give a file, a folder, or a name like builtin.")
    try:
        return parse_source(text)
    except CalibrationError as error:
        raise RequestError(str(error)) from error
