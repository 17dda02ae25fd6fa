"""Which tool made a report, and when."""

from __future__ import annotations

from datetime import UTC, datetime

from prune_cli.report.types import Tool
from prune_cli.version import __version__


def tool_facts() -> Tool:
    return Tool("prune-cli", __version__)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
