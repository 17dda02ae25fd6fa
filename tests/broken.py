"""Breaks checkpoints in one place, and checks that a request is refused as every refusal must look."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from prune_cli.checkpoint.file_names import partial_folder
from tests.conftest import RunCommand

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


def refused(command: RunCommand, model: object, out: Path, *arguments: object) -> str:
    """Ask for a run that must be refused: exit code 2, one sentence and nothing else, nothing written."""
    if not {"-m", "--method", "--calibration"} & set(arguments):
        arguments = ("-m", "magnitude", *arguments)
    outcome = command("prune", model, out, "-q", *arguments)
    message = outcome.stderr
    assert outcome.code == 2, message
    assert outcome.stdout == ""
    assert message.startswith("Error: ")
    assert message.endswith(".\n")
    assert message.count("\n") == 1
    assert not out.exists()
    assert not partial_folder(out).exists()
    return message


def copy_of(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def change_config(folder: Path, **values: object) -> Path:
    """Set keys of config.json; None takes a key out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def split_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes after it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_shard(path: Path, header: str | dict[str, Any], data: bytes) -> None:
    """Write a safetensors file, with whatever stands in `header`."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor_names(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def change_index(folder: Path, changes: dict[str, object]) -> Path:
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))
    return folder
