"""config.json of a sparse checkpoint: one entry more, so that transformers asks for the package that decodes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_cli.errors import RequestError
from prune_cli.sparse.format import QUANT_METHOD, VERSION

_KEY = "quantization_config"


def with_entry(text: str, path: Path) -> str:
    """The text of a dense config.json with our entry at its end; all else stays as it is, to the byte."""
    config = _parsed(text, path)
    for where in (config, *(value for value in config.values() if isinstance(value, dict))):
        if where.get(_KEY):
            method = where[_KEY].get("quant_method") if isinstance(where[_KEY], dict) else None
            raise RequestError(
                f"{path} has a {_KEY} ({method}) already and transformers takes one: convert the checkpoint without it."
            )
    body = text.rstrip().removesuffix("}").rstrip()
    return body + (_block() if config else _block().removeprefix(",")) + text[len(body) :]


def without_entry(text: str, path: Path) -> str:
    """The inverse of `with_entry`; a config.json that was written anew since loses the entry alone."""
    for block in (_block(), _block().removeprefix(",")):
        if block in text and _KEY not in json.loads(text.replace(block, "")):
            return text.replace(block, "")
    config = _parsed(text, path)
    if is_ours(config):
        del config[_KEY]
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def is_ours(config: dict[str, Any]) -> bool:
    entry = config.get(_KEY)
    return isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD


def _block() -> str:
    entry = json.dumps({"quant_method": QUANT_METHOD, "version": VERSION}, indent=2).replace("\n", "\n  ")
    return f',\n  "{_KEY}": {entry}'


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path} is no JSON object: download it again.")
    return config
