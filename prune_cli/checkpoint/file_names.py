"""The names in an output folder, and of the folder while it is being made. No torch here: `push` needs only these."""

from __future__ import annotations

from pathlib import Path

from prune_cli.checkpoint.reader import ADAPTER_CONFIG, PICKLE_SUFFIXES

OTHER_WEIGHTS = (*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite")
CONFIG_FILE = "config.json"
JOURNAL = ".prune-journal.jsonl"
REPORT_MARKDOWN = "prune_report.md"
REPORT_PAGE = "prune_report.html"
RECOVER_JSON, RECOVER_MARKDOWN, RECOVER_PAGE = "recover_report.json", "recover_report.md", "recover_report.html"
CARD = "README.md"
SOURCE_CARD = "SOURCE_README.md"


def partial_folder(out: Path) -> Path:
    """Where OUT is built before one rename makes it OUT."""
    return out.with_name(out.name + ".partial")


REPORT_JSON = "prune_report.json"
# Everything that tells of a run; a model that is made of the output has its own.
REPORTS = (REPORT_JSON, REPORT_MARKDOWN, REPORT_PAGE, RECOVER_JSON, RECOVER_MARKDOWN, RECOVER_PAGE)


def why_not_copied(file: str) -> str:
    """What a run tells of a side file that it left behind."""
    if Path(file).name == ADAPTER_CONFIG:
        return (
            f"{file} was not copied: the adapter that lies beside the model took no part in this run; if the model is "
            "meant to be used with it, merge it into the model first (merge_and_unload)."
        )
    return f"{file} was not copied: it holds weights that this run did not look at."
