"""config.json of a sparse checkpoint: one entry more, so that transformers asks for the package that decodes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_cli.errors import RequestError
from prune_cli.sparse.format import QUANT_METHOD, VERSION, VERSIONS

LOADER = "sparse_loader.py"
_KEY = "quantization_config"
_CODE_KEY = "auto_map"
OURS = (_KEY, _CODE_KEY)
_AUTO_CLASSES = (
    "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForImageTextToText",
)  # fmt: skip
# Names the class in LOADER for each of them.
CODE = {name: f"{LOADER.removesuffix('.py')}.SparseLoader" for name in _AUTO_CLASSES}


def with_entry(text: str, path: Path, *, self_contained: bool = False, version: int = VERSION) -> str:
    """The text of a dense config.json with our entry at its end; all else stays as it is, to the byte.

    With `self_contained` also one that names the loader for trust_remote_code.
    """
    config = _parsed(text, path)
    if self_contained and _CODE_KEY in config:
        raise RequestError(f"{path} has an {_CODE_KEY} for code of its own already: leave out --self-contained.")
    for where in (config, *(value for value in config.values() if isinstance(value, dict))):
        if where.get(_KEY):
            method = where[_KEY].get("quant_method") if isinstance(where[_KEY], dict) else None
            raise RequestError(
                f"{path} has a {_KEY} ({method}) already and transformers takes one: convert the checkpoint without it."
            )
    body = text.rstrip().removesuffix("}").rstrip()
    block = _block(version) + (_code_block() if self_contained else "")
    return body + (block if config else block.removeprefix(",")) + text[len(body) :]


def check_self_contained(folder: Path) -> None:
    """Raises RequestError for a checkpoint beside which the loader cannot lie."""
    if not (folder / "config.json").is_file() or (folder / LOADER).exists():
        raise RequestError(f"{folder} has no config.json, or a {LOADER}: leave out --self-contained.")


def loader() -> str:
    """The program that `self_contained` needs beside config.json, as a file named LOADER."""
    return Path(__file__).with_name(LOADER).read_text(encoding="utf-8")


def without_entry(text: str, path: Path) -> str:
    """The inverse of `with_entry`; a config.json that was written anew since loses the entry alone."""
    ours = [_block(version) for version in VERSIONS]
    for block in (form for each in ours for form in (each + _code_block(), each, each.removeprefix(","))):
        if block in text and _KEY not in json.loads(text.replace(block, "")):
            return text.replace(block, "")
    return json.dumps(without_ours(_parsed(text, path)), indent=2, ensure_ascii=False) + "\n"


def without_ours(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says but for our entries."""
    ours = {_KEY} if is_ours(config) else set()
    ours |= {_CODE_KEY} if config.get(_CODE_KEY) == CODE else set()
    return {key: value for key, value in config.items() if key not in ours}


def is_ours(config: dict[str, Any]) -> bool:
    entry = config.get(_KEY)
    return isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD


def is_self_contained(config: dict[str, Any]) -> bool:
    return is_ours(config) and config.get(_CODE_KEY) == CODE


def _code_block() -> str:
    code = json.dumps(CODE, indent=2).replace("\n", "\n  ")
    return f',\n  "{_CODE_KEY}": {code}'


def _block(version: int) -> str:
    entry = json.dumps({"quant_method": QUANT_METHOD, "version": version}, indent=2).replace("\n", "\n  ")
    return f',\n  "{_KEY}": {entry}'


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path} is no JSON object: download it again.")
    return config
