"""The reports of an output as others may see them: without the paths of the machine that made it."""

from __future__ import annotations

import html
import json
from collections.abc import Collection
from pathlib import Path

from prune_cli.checkpoint.file_names import CARD, REPORTS


def public_texts(out: Path, named: Collection[str]) -> dict[str, bytes]:
    """File name to text, of the reports in `out` that tell of the paths `named`: each is only its last part there."""
    paths = sorted(named, key=lambda path: (-len(path), path))
    changed = {}
    for name in (*REPORTS, CARD):
        if (out / name).is_file():
            text = given = (out / name).read_text(encoding="utf-8")
            for path in paths:
                for form in (str, html.escape, lambda path: json.dumps(path)[1:-1]):
                    text = text.replace(form(path), form(_last(path)))
            if text != given:
                changed[name] = text.encode()
    return changed


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
