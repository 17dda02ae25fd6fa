"""The kinds of numbers that a report has."""

from __future__ import annotations

from typing import Annotated

from prune_cli.request.json_schema import Keywords

Count = Annotated[int, Keywords(minimum=0)]
Positive = Annotated[int, Keywords(minimum=1)]
Share = Annotated[float, Keywords(minimum=0, maximum=1)]
NotNegative = Annotated[float, Keywords(minimum=0)]
