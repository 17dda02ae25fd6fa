"""One door to both kinds of runs: weights made sparse, or whole units removed."""

from __future__ import annotations

import torch

from prune_cli.progress import Progress, Silent
from prune_cli.ranks.environment import SILENCE_SECONDS
from prune_cli.ranks.join import joined
from prune_cli.report.types import Report
from prune_cli.request.request import PruneRequest
from prune_cli.structured.run import prune_structured
from prune_cli.unstructured.run import prune_unstructured


@torch.no_grad()
def prune(request: PruneRequest, progress: Progress | None = None, *, rank_timeout: float = SILENCE_SECONDS) -> Report:
    """Prune as `request` says and write OUT; returns the report that is written there too.

    Raises RequestError before any work where the request cannot be met, PruneError where the run fails. A run that was
    killed or interrupted continues with `resume=True` and writes the same bytes. Where torchrun or the like has started
    several processes, they do it together; `rank_timeout` is after how many seconds without a sign of life one counts
    as hanging.
    """
    run = prune_structured if request.is_structured else prune_unstructured
    with joined(request.device, rank_timeout) as ranks:
        return run(request, (progress if ranks.first else None) or Silent(), ranks)
