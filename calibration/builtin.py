"""English and code as a frozen text in this package, the same on every machine; SOURCES.md tells where it comes from.

`examples/make_builtin_text.py` wrote it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from functools import cache
from importlib import resources

from calibration.errors import CalibrationError

# Of the text as JSON lines, unpacked. Another text is another version of it, and another hash in every report.
SHA256 = "076e6e87f0ab7c734a2ae049debd1fa81a3de5c3ffdafb1c60fb436bc07f38db"
_FILE = "builtin.jsonl.gz"
_HELD_OUT_TENTHS = 1


def builtin_documents(split: str) -> Iterator[str]:
    """Yield the documents of `split` ("train" or "test"), prose and code mixed. Raises CalibrationError.

    A document belongs to the test split by the hash of its name, so the two splits never share one.
    """
    for line in _unpacked().splitlines():
        document = json.loads(line)
        if is_held_out(document["name"]) == (split == "test"):
            yield document["text"]


def is_held_out(name: str) -> bool:
    """Whether the document `name` belongs to the test split."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 < _HELD_OUT_TENTHS


@cache
def _unpacked() -> bytes:
    try:
        text = gzip.decompress(resources.files("calibration").joinpath(_FILE).read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"The package's {_FILE} cannot be read ({error}): install prune-cli again.") from error
    if hashlib.sha256(text).hexdigest() != SHA256:
        raise CalibrationError(f"The package's {_FILE} is not the text of this version: install prune-cli again.")
    return text
