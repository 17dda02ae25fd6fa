"""One door to both kinds of runs: weights made sparse, or whole units removed."""

from __future__ import annotations

import torch

from prune_cli.progress import Progress, Silent
from prune_cli.report.types import Report
from prune_cli.request.request import PruneRequest
from prune_cli.structured.run import prune_structured
from prune_cli.unstructured.run import prune_unstructured


@torch.no_grad()
def prune(request: PruneRequest, progress: Progress | None = None) -> Report:
    """Prune as `request` says and write OUT; returns the report that is written there too.

    Raises RequestError before any work where the request cannot be met, PruneError where the run fails. A run that was
    killed or interrupted continues with `resume=True` and writes the same bytes.
    """
    progress = progress or Silent()
    run = prune_structured if request.is_structured else prune_unstructured
    return run(request, progress)
