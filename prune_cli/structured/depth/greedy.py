"""The loss without each of the blocks in turn: all candidates pass the model side by side, one block in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from calibration.batch import Batch
from prune_cli.engine.evaluate import by_tokens, mean, window_losses
from prune_cli.engine.lockstep import BlockOverride, tensors_in
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError
from prune_cli.progress import Progress
from prune_cli.structured.depth.refit import fit_block, pass_both, two_streams
from prune_cli.structured.depth.skip_block import Skipping
from prune_cli.structured.hidden_states import refuse_changed_input
from prune_cli.structured.prepare import PreparedStructure

_STATES_PER_TOKEN = 3


class Removals:
    """Losses in nats of the model without some of its blocks, on `batches`."""

    def __init__(self, prepared: OpenModel, batches: Sequence[Batch], progress: Progress) -> None:
        self._job = prepared
        self._batches = batches
        self._progress = progress
        self._skipping = Skipping()

    def losses(self, removed: Collection[int], candidates: Sequence[int]) -> dict[int, float]:
        """The loss without `removed` and each of `candidates`; the number of blocks stands for no other block.

        A block that is left out is not run: the hidden states that come to it go on. Before its own block, a
        candidate's states are those of all others, and are computed once. Infinite where it is not a number.
        Raises PruneError where none is finite.
        """
        found: dict[int, float] = {}
        for group in self._groups(candidates):
            found |= self._pass(frozenset(removed), group)
        if not any(math.isfinite(loss) for loss in found.values()):
            raise PruneError(
                "The loss is not finite whichever block is left out: the forward pass overflows; try --dtype float32."
            )
        return {candidate: math.inf if math.isnan(loss) else loss for candidate, loss in found.items()}

    def passes(self, candidates: int) -> int:
        """How often the weights are read for so many candidates, as hidden states of few go side by side."""
        return -(-candidates // self._concurrent())

    def _concurrent(self) -> int:
        tokens = sum(batch.ids.numel() for batch in self._batches)
        model = self._job.model
        return max(
            1, self._job.budget.together // (tokens * model.hidden_size * model.dtype.itemsize * _STATES_PER_TOKEN)
        )

    def _groups(self, candidates: Sequence[int]) -> Iterator[list[int]]:
        """Latest first: the first candidate of a group computes what the others share with it."""
        ordered = sorted(candidates, reverse=True)
        for begin in range(0, len(ordered), self._concurrent()):
            yield ordered[begin : begin + self._concurrent()]

    def _pass(self, removed: frozenset[int], group: Sequence[int]) -> dict[int, float]:
        ranks, mine = self._job.ranks, self._job.ranks.share(self._batches)
        pairs = [(number, candidate) for number in range(len(mine)) for candidate in group]
        batches = [mine[number] for number, _ in pairs]
        with Stream(self._job.model, batches) as stream:
            for block in range(len(self._job.model.blocks)):
                if block not in removed or not self._skipping.knows(block):
                    stream.load(block)
                stream.run_block(block, self._passing(block, removed, pairs, stream))
                stream.unload(block)
                self._progress.advance()
            losses = iter(window_losses(stream))
        by_candidate: dict[int, list[float]] = {candidate: [] for candidate in group}
        for (_, candidate), batch in zip(pairs, batches, strict=True):
            by_candidate[candidate] += [next(losses) for _ in range(len(batch))]
        parts = ranks.gathered(by_candidate)
        losses_of = {candidate: [loss for part in parts for loss in part[candidate]] for candidate in group}
        return {candidate: mean(by_tokens(values, self._batches)) for candidate, values in losses_of.items()}

    def _passing(
        self, block: int, removed: frozenset[int], pairs: Sequence[tuple[int, int]], stream: Stream
    ) -> BlockOverride:
        shared: dict[int, Any] = {}

        def passing(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            number, candidate = pairs[stream.current()]
            if block in removed or block == candidate:
                return self._skipping.skip(block, original, args, kwargs)
            if block < candidate and number in shared:
                return shared[number]
            before = tensors_in(args, kwargs)[0]
            version = before._version
            output = original(*args, **kwargs)
            refuse_changed_input(before, version)
            self._skipping.remember(block, output)
            if block < candidate:
                shared[number] = output
            return output

        return passing


def refitted_loss(
    prepared: PreparedStructure, removed: Collection[int], batches: Sequence[Batch], progress: Progress
) -> float:
    """In nats on `batches`, which is also what is fitted to; infinite where it is not a number."""

    def keep(block: int, stream: Stream, dense: Stream) -> None:
        tensors = stream.load(block)
        if block > min(removed):
            fit_block(prepared, block, tensors, stream, dense)
        else:
            dense.run_block(block)
            stream.run_block(block)

    with two_streams(prepared, batches) as (stream, dense):
        for _ in pass_both(stream, dense, len(prepared.model.blocks), removed, keep):
            progress.advance()
        loss = mean(by_tokens(window_losses(stream), batches))
    return math.inf if math.isnan(loss) else loss
