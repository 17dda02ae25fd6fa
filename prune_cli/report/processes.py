"""What several processes of one run cost each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune_cli.report.numbers import Count, NotNegative, Positive


@dataclass(frozen=True)
class Processes:
    """The processes of one run on `nodes` machines; lists have one entry for each, in the order of their ranks.

    `bytes_reduced` are those that all of them gave into exchanges, `seconds_waited` what exchanges took.
    """

    ranks: Positive
    nodes: Positive
    bytes_reduced: Count
    seconds_waited: Sequence[NotNegative]
    peak_host_bytes: Sequence[Count]
