"""Both models go through the text side by side, and each block of the pruned one learns what the teacher's did.

In memory are one block of the teacher or one of the pruned model with its gradients, and the hidden states of both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from calibration.batch import Batch
from methods._block_matching import Examples, Forward, Matched, Schedule, match
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.block_outputs import hidden_states
from prune_cli.engine.lockstep import Call
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.padding import real_rows
from prune_cli.engine.seeds import seed_of
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.recovery.trained_block import Trained, as_stored, trainable, trained_names


@dataclass(frozen=True)
class Pair:
    """A pruned model and its teacher; `runs` are those of `counterparts`, one for each block of the student."""

    student: StreamedModel
    teacher: StreamedModel
    runs: Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Samples:
    """Batches to fit, and those held out, by which the best epoch is chosen."""

    fit: Sequence[Batch]
    held_out: Sequence[Batch]


@dataclass(frozen=True)
class Matching:
    """How blocks are trained; `first_group` is the output's number of the first block in its journal."""

    schedule: Schedule
    seed: int
    first_group: int = 0


def match_blocks(
    pair: Pair, samples: Samples, matching: Matching, output: OutputFolder, progress: Progress, memory: PeakMemory
) -> None:
    """Train every block in turn and write it to `output`; one that an earlier run wrote is passed as it was left.

    Raises PruneError where the hidden states are not finite, or a dtype cannot hold new weights (by name).
    """
    matcher = _Matcher(pair, samples, matching, output)
    batches = [*samples.fit, *samples.held_out]
    parking = ActivationOffload(output.partial)
    progress.stage("Matching the blocks", len(pair.runs))
    with Stream(pair.student, batches, parking) as stream, Stream(pair.teacher, batches, parking) as dense:
        for block in range(len(pair.runs)):
            matcher.take(block, stream, dense)
            memory.look()
            progress.advance()
    output.wait()


@dataclass
class _Matcher:
    pair: Pair
    samples: Samples
    matching: Matching
    output: OutputFolder

    def take(self, block: int, stream: Stream, dense: Stream) -> None:
        """Both streams through the student's `block` and the teacher's run of blocks beside it."""
        if self.matching.first_group + block in self.output.done:
            _pass_run(dense, self.pair.runs[block])
            stream.load(block, self.output.checkpoint())
        else:
            begun = time.monotonic()
            targets = _pass_run(dense, self.pair.runs[block])
            tensors = stream.load(block)
            matched, new = self._train(block, stream, tensors, targets)
            self._write(block, new, matched, time.monotonic() - begun)
            stream.unload(block)
            # As it would be read back: a run that is resumed sees the same.
            stream.load(block, Trained(self.pair.student.checkpoint, new))
        stream.run_block(block)
        stream.unload(block)

    def _train(
        self, block: int, stream: Stream, tensors: dict[str, torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> tuple[Matched, dict[str, torch.Tensor]]:
        student, fit = self.pair.student, len(self.samples.fit)
        batches = [*self.samples.fit, *self.samples.held_out]
        forwards = [_forward(student, call, batch) for call, batch in zip(stream.calls(), batches, strict=True)]
        rows = [real_rows(target, batch) for target, batch in zip(targets, batches, strict=True)]
        generator = torch.Generator().manual_seed(seed_of(f"block {block}", self.matching.seed))
        with trainable(student, trained_names(student, block)) as parameters:
            examples = Examples(forwards[:fit], rows[:fit]), Examples(forwards[fit:], rows[fit:])
            matched = match(parameters, *examples, self.matching.schedule, generator)
            if not math.isfinite(matched.before):
                raise PruneError(
                    f"The hidden states of block {block} are not finite: the forward pass overflows; try "
                    "--dtype float32."
                )
            return matched, as_stored(student, tensors, parameters)

    def _write(self, block: int, new: dict[str, torch.Tensor], matched: Matched, seconds: float) -> None:
        record: dict[str, Any] = {"seconds": seconds, "matched": asdict(matched)}
        stored = self.pair.student.checkpoint.as_stored(new)
        self.output.write_block(self.matching.first_group + block, stored, record)


def _pass_run(dense: Stream, run: Sequence[int]) -> list[torch.Tensor]:
    """Take the teacher through the blocks of `run`; the hidden states behind the last, one tensor a batch."""
    found: dict[int, torch.Tensor] = {}

    def keep(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = original(*args, **kwargs)
        found[dense.current()] = hidden_states(output)
        return output

    for block in run:
        dense.load(block)
        dense.run_block(block, keep if block == run[-1] else None)
        dense.unload(block)
    return [found[number] for number in sorted(found)]


def _forward(model: StreamedModel, call: Call, batch: Batch) -> Forward:
    """The block's outputs for `batch`, real tokens alone."""
    mixed = model.dtype != torch.float32

    def forward() -> torch.Tensor:
        # The weights are float32 while they are trained.
        with torch.autocast(model.device.type, model.dtype) if mixed else nullcontext():
            return real_rows(hidden_states(call()), batch)

    return forward
