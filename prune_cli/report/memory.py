"""What a run was fitted into, where that was asked for or needed."""

from __future__ import annotations

from dataclasses import dataclass

from prune_cli.report.numbers import Count, Positive


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process. Both limits are --limit-memory where it was `asked` for, else what was free at the start.

    Limits and estimates of the device are None on a CPU. `hidden_states` of each model wait in memory, what is beyond
    them in files or for another pass over the weights; None: as many as without a limit.
    """

    asked: bool
    host_limit: Positive | None
    device_limit: Positive | None
    host_estimate: Count
    device_estimate: Count | None
    hidden_states: Count | None
