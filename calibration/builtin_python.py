"""builtin:python: English and code that every Python installation carries, each version of Python its own."""

import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from calibration.builtin import is_held_out

_SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "ensurepip",
        "lib2to3",
        "__pycache__",
    }
)


def python_documents(split: str) -> Iterator[str]:
    """Yield the documents of `split` ("train" or "test"), topics of `pydoc` first, then standard-library sources.

    A document belongs to the test split by the hash of its name, so the two splits never share one.
    """
    for name, text in _named_documents():
        if is_held_out(name) == (split == "test"):
            yield text


def _named_documents() -> Iterator[tuple[str, str]]:
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield f"topic:{name}", topics[name]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(_python_files(root)):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield path.relative_to(root).as_posix(), text


def _python_files(root: Path) -> Iterator[Path]:
    """Every file that is not in a skipped folder, without walking through those: site-packages can be huge."""
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))
