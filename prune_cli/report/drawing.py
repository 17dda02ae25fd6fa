"""Charts are drawn by vl-convert, an optional extra: what is told where it is missed."""

from __future__ import annotations

from typing import Any

NOT_DRAWN = "No chart is drawn without vl-convert: pip install 'prune-cli[plots]'."


def vl_convert() -> Any | None:
    """The package, None where it is not installed."""
    try:
        import vl_convert
    except ImportError:
        return None
    return vl_convert
