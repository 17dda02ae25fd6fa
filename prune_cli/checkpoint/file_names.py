"""The names in an output folder, and of the folder while it is being made. No torch here: `push` needs only these."""

from __future__ import annotations

from pathlib import Path

from prune_cli.checkpoint.reader import PICKLE_SUFFIXES

OTHER_WEIGHTS = (*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite")
CONFIG_FILE = "config.json"
JOURNAL = ".prune-journal.jsonl"
REPORT_MARKDOWN = "prune_report.md"
REPORT_PAGE = "prune_report.html"
CARD = "README.md"
SOURCE_CARD = "SOURCE_README.md"


def partial_folder(out: Path) -> Path:
    """Where OUT is built before one rename makes it OUT."""
    return out.with_name(out.name + ".partial")


REPORT_JSON = "prune_report.json"
