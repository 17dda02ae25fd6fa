"""Makes README.md fit for PyPI, which shows it alone: its links to files of this repository become absolute."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = "prune-cli/prune-cli"
_LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|#)([^)]+)\)")


def absolute(text: str, version: str) -> str:
    """`text` with its relative links pointing to the tag of `version`, images to their bytes."""

    def link(match: re.Match[str]) -> str:
        place = f"https://github.com/{REPOSITORY}/blob/v{version}"
        place = f"https://raw.githubusercontent.com/{REPOSITORY}/v{version}" if match[1] else place
        return f"{match[1]}{match[2]}({place}/{match[3]})"

    return _LINK.sub(link, text)


if __name__ == "__main__":
    from prune_cli.version import __version__

    readme = Path(__file__).parent.parent / "README.md"
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), __version__), encoding="utf-8")
