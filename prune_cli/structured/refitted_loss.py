"""The loss without some blocks once what is left is fitted: what greedy looks at before it takes a block for good."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from calibration.batch import Batch
from prune_cli.evaluate import by_tokens, mean, window_losses
from prune_cli.progress import Progress
from prune_cli.stream import Stream
from prune_cli.structured.prepare import StructuredJob
from prune_cli.structured.refit import fit_block, pass_both, two_streams


def refitted_loss(job: StructuredJob, removed: Collection[int], batches: Sequence[Batch], progress: Progress) -> float:
    """In nats on `batches`, which is also what is fitted to; infinite where it is not a number."""

    def keep(block: int, stream: Stream, dense: Stream) -> None:
        tensors = stream.load(block)
        if block > min(removed):
            fit_block(job, block, tensors, stream, dense)
        else:
            dense.through(block)
            stream.through(block)

    with two_streams(job, batches) as (stream, dense):
        for _ in pass_both(stream, dense, len(job.model.blocks), removed, keep):
            progress.advance()
        loss = mean(by_tokens(window_losses(stream, batches), batches))
    return math.inf if math.isnan(loss) else loss
