"""One pass over the hidden states: how far every block turns them, and how far apart any two boundaries are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibration.batch import Batch
from calibration.statistics import sum_dtype
from methods.structured.depth import angular_distances, cosines
from prune_cli.engine.block_outputs import hidden_states
from prune_cli.engine.lockstep import BlockOverride, tensors_in
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.padding import real_rows
from prune_cli.engine.run_context import Run
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError
from prune_cli.progress import Progress
from prune_cli.structured.statistics_file import Statistics

# Distances between all boundaries need the states of all of them at once: of so many tokens, evenly spaced.
_TOKENS = 512
MEASURING_STATES = "Measuring the hidden states"


def known_states(run: Run[OpenModel], known: Statistics) -> Statistics:
    """`influence` and `distances`, as `measure_states` returns them; measured if neither `known` nor this run has."""
    if "influence" in known.tensors:
        return known
    if "states" in run.output.notes:
        found = run.output.notes["states"]
        return Statistics({name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()})
    influence, distances = measure_states(run.plan, run.batches(), run.progress)
    run.output.note("states", {"influence": influence.tolist(), "distances": distances.tolist()})
    return Statistics({"influence": influence, "distances": distances})


def measure_states(
    opened: OpenModel, batches: Sequence[Batch], progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block influence (blocks,) over all tokens, and the angular distances (blocks + 1, blocks + 1), both float64.

    Row i of the distances is the state before block i, the last one what the last block returns; the upper triangle
    holds means over evenly spaced tokens. Raises PruneError where the states are not finite.
    """
    sums = gather_states(opened, batches, sum(batch.tokens for batch in batches), progress)
    influence, distances = sums.influence(), sums.distances()
    if not (torch.isfinite(influence).all() and torch.isfinite(distances).all()):
        raise PruneError("The hidden states are not finite: the forward pass overflows; try --dtype float32.")
    return influence, distances


def gather_states(opened: OpenModel, batches: Sequence[Batch], tokens: int, progress: Progress) -> StateSums:
    """The sums behind `measure_states` over `batches`, perhaps a part of the text, which has `tokens` tokens in all."""
    blocks = len(opened.model.blocks)
    measure = _States(blocks, tokens)
    progress.stage(MEASURING_STATES, blocks)
    with Stream(opened.model, batches, ranks=opened.ranks) as stream:
        for block in range(blocks if stream.batches else 0):
            stream.load(block)
            stream.run_block(block, measure.passing(block, stream))
            stream.unload(block)
            measure.next_boundary(block)
            progress.advance()
    first, *others = opened.ranks.gathered(measure.sums)
    for sums in others:
        first.merge(sums)
    return first


@dataclass
class StateSums:
    """Sums in float64 on the host: what processes that each look at some of the batches exchange.

    `turned` (blocks,) sums 1 - cos over `tokens` tokens; `apart` (blocks + 1, blocks + 1) sums the angular distances
    between boundaries over `samples` of them.
    """

    turned: torch.Tensor
    apart: torch.Tensor
    tokens: int = 0
    samples: int = 0

    @classmethod
    def of(cls, blocks: int) -> StateSums:
        """Of no token yet."""
        wide = torch.float64
        return cls(torch.zeros(blocks, dtype=wide), torch.zeros(blocks + 1, blocks + 1, dtype=wide))

    def merge(self, other: StateSums) -> None:
        """Take in those of later batches: up to rounding, as if all had been summed here."""
        self.turned += other.turned
        self.apart += other.apart
        self.tokens += other.tokens
        self.samples += other.samples

    def influence(self) -> torch.Tensor:
        """(blocks,): the mean over tokens."""
        return self.turned / self.tokens

    def distances(self) -> torch.Tensor:
        """(blocks + 1, blocks + 1): the mean over samples."""
        return self.apart / self.samples


class _States:
    """What one pass gathers; `boundaries` holds sampled states (samples, hidden) of every boundary so far."""

    def __init__(self, blocks: int, tokens: int) -> None:
        self.sums = StateSums.of(blocks)
        self._every = max(1, tokens // _TOKENS)
        self._before: list[torch.Tensor] = []
        self._after: list[torch.Tensor] = []
        self._turned: list[torch.Tensor] = []
        self._boundaries: list[torch.Tensor] = []

    def passing(self, block: int, stream: Stream) -> BlockOverride:
        def measured(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = tensors_in(args, kwargs)[0]
            version = before._version
            output = original(*args, **kwargs)
            refuse_changed_input(before, version)
            after = hidden_states(output)
            batch = stream.passing()
            before, after = real_rows(before, batch), real_rows(after, batch)
            turned = 1 - cosines(before, after, sum_dtype(before.device))
            self._turned.append(turned.sum())
            self.sums.tokens += turned.numel() if block == 0 else 0
            self._before.append(self._sampled(before))
            self._after.append(self._sampled(after))
            return output

        return measured

    def _sampled(self, states: torch.Tensor) -> torch.Tensor:
        return states[self._every - 1 :: self._every].clone()

    def next_boundary(self, block: int) -> None:
        # One after the other, so that the sum has the same bits on every device.
        for turned in torch.stack(self._turned).tolist():
            self.sums.turned[block] += turned
        self._boundaries.append(torch.cat(self._before))
        self._compare_last()
        if block + 1 == len(self.sums.turned):
            self._boundaries.append(torch.cat(self._after))
            self._compare_last()
        self._before, self._after, self._turned = [], [], []

    def _compare_last(self) -> None:
        *before, last = self._boundaries
        for old, states in enumerate(before):
            apart = angular_distances(states, last, sum_dtype(last.device))
            self.sums.apart[old, len(before)] = apart.sum().cpu()
        self.sums.samples = len(last)


def refuse_changed_input(tensor: torch.Tensor, version: int) -> None:
    """Raise PruneError where a block has changed its input, which others still need, in place."""
    if tensor._version != version:
        raise PruneError(
            "This architecture changes the inputs of its blocks in place, so that they cannot be compared: name the "
            "blocks with -o which=."
        )
