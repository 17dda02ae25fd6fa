"""config.json and the tokenizer's files of a checkpoint folder, as far as they are told without transformers."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from prune_cli.errors import RequestError

# Names that the longest sequence of a model has in config.json.
POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands; raises RequestError where there is none or it is no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise RequestError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path} is no JSON object: download it again.")
    for key, kind, wanted in (
        ("model_type", str, "a text"),
        ("architectures", list, "a list of class names"),
        ("auto_map", dict, "an object"),
    ):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise RequestError(f"{path} has {key} = {reprlib.repr(config[key])}, expected {wanted}: download it again.")
    return config


def has_tokenizer(folder: Path) -> bool:
    """Whether any file that a tokenizer is loaded from lies in `folder`."""
    return any((folder / name).is_file() for name in _TOKENIZERS)
