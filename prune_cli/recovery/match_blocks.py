"""Both models go through the text side by side, and each block of the pruned one learns what the teacher's did.

In memory are one block of the teacher or one of the pruned model with its gradients, and the hidden states of both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from calibration.batch import Batch
from methods._block_matching import Examples, Forward, Matched, Schedule, match
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.block_outputs import hidden_states
from prune_cli.engine.padding import real_rows
from prune_cli.engine.seeds import seed_of
from prune_cli.engine.stream import Stream
from prune_cli.engine.waiting_batches import Call
from prune_cli.errors import PruneError
from prune_cli.model.roles import Role
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.recovery.trained_block import TRAINED, Trained, as_stored, trainable, trained_names

MATCHING = "Matching the blocks"
# One sample of so many is held out.
_HELD_OUT_OF = 8
# Smaller steps are more of them for as many tokens; larger ones are quicker.
_TOKENS_PER_STEP = 1024
# Of the learning rate, at the end of the cosine.
_LAST_RATE = 0.05


@dataclass(frozen=True)
class Pair:
    """A pruned model and its teacher; `runs` are those of `counterparts`, one for each block of the student."""

    student: StreamedModel
    teacher: StreamedModel
    runs: Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Samples:
    """Batches to fit, and those held out, by which the best epoch is chosen; `beside` take no part in the training."""

    fit: Sequence[Batch]
    held_out: Sequence[Batch]
    beside: Sequence[Batch] = ()

    @property
    def batches(self) -> list[Batch]:
        """All, in the order in which they go through the models."""
        return [*self.fit, *self.held_out, *self.beside]


def held_out_of(samples: int) -> int:
    """How many of so many samples are held out."""
    return max(1, samples // _HELD_OUT_OF)


def samples_per_step(asked: int | Literal["auto"], length: int) -> int:
    """Of `length` tokens each, as many as were `asked` for; auto: a step of about 1024 tokens."""
    return asked if asked != "auto" else max(1, _TOKENS_PER_STEP // length)


@dataclass(frozen=True)
class Matching:
    """How blocks are trained."""

    schedule: Schedule
    seed: int

    @classmethod
    def of(cls, epochs: int, rate: float, seed: int) -> Matching:
        """The usual cosine."""
        return cls(Schedule(epochs, rate, _LAST_RATE), seed)


def match_blocks(pair: Pair, samples: Samples, matching: Matching, output: OutputFolder, progress: Progress) -> None:
    """Train every block in turn and write it to `output`; one that an earlier run wrote is passed as it was left.

    Raises PruneError where the hidden states are not finite, or a dtype cannot hold new weights (by name).
    """
    matcher = _Matcher(pair, samples, matching, output)
    batches = samples.batches
    parking = ActivationOffload(output.partial)
    progress.stage(MATCHING, len(pair.runs))
    with Stream(pair.student, batches, parking) as stream, Stream(pair.teacher, batches, parking) as dense:
        for block in range(len(pair.runs)):
            matcher.take(block, stream, dense)
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
        if block in self.output.done:
            pass_run(dense, self.pair.runs[block])
            stream.load(block, self.output.checkpoint())
            stream.run_block(block)
        else:
            begun = time.monotonic()
            targets = pass_run(dense, self.pair.runs[block])
            tensors = stream.load(block)
            trainer = BlockTrainer(self.pair.student, self.samples, self.matching)
            matched, new = trainer.train(block, tensors, stream.calls(), targets)
            self._write(block, new, matched, time.monotonic() - begun)
            pass_trained(stream, block, new)
        stream.unload(block)

    def _write(self, block: int, new: dict[str, torch.Tensor], matched: Matched, seconds: float) -> None:
        record: dict[str, Any] = {"seconds": seconds, "matched": asdict(matched)}
        checkpoint = self.pair.student.checkpoint
        stored = {checkpoint.stored_name(name): checkpoint.to_file(name, values) for name, values in new.items()}
        self.output.write_block(block, stored, record)


@dataclass(frozen=True)
class BlockTrainer:
    """Trains blocks of `model`, one at a time."""

    model: StreamedModel
    samples: Samples
    matching: Matching

    def train(
        self,
        block: int,
        tensors: Mapping[str, torch.Tensor],
        calls: Sequence[Call],
        targets: Sequence[torch.Tensor],
        roles: Collection[Role] = TRAINED,
    ) -> tuple[Matched, dict[str, torch.Tensor]]:
        """What came of it, and the new values of `tensors`, which are those that `block` is loaded with; `roles` move.

        `calls` are how the samples' batches are about to call it, `targets` the hidden states to reach, one a batch.
        Raises PruneError where the hidden states are not finite, or a dtype cannot hold new weights (by name).
        """
        fit, seen = len(self.samples.fit), len(self.samples.fit) + len(self.samples.held_out)
        batches = self.samples.batches[:seen]
        forwards = [_forward(self.model, call, batch) for call, batch in zip(calls[:seen], batches, strict=True)]
        rows = [real_rows(target, batch) for target, batch in zip(targets[:seen], batches, strict=True)]
        generator = torch.Generator().manual_seed(seed_of(f"block {block}", self.matching.seed))
        with trainable(self.model, trained_names(self.model, block, roles)) as parameters:
            examples = Examples(forwards[:fit], rows[:fit]), Examples(forwards[fit:], rows[fit:])
            matched = match(parameters, *examples, self.matching.schedule, generator)
            if not math.isfinite(matched.before):
                raise PruneError(
                    f"The hidden states of block {block} are not finite: the forward pass overflows; try "
                    "--dtype float32."
                )
            return matched, as_stored(self.model, tensors, parameters)


def pass_trained(stream: Stream, block: int, new: Mapping[str, torch.Tensor]) -> None:
    """Take all batches through `block` with its `new` values as they would be read back, as a resumed run does."""
    stream.unload(block)
    stream.load(block, Trained(stream.model.checkpoint, new))
    stream.run_block(block)


def pass_run(dense: Stream, run: Sequence[int]) -> list[torch.Tensor]:
    """Take the teacher through the blocks of `run`; the hidden states behind the last, one tensor a batch."""
    states: list[torch.Tensor] = []
    for block in run:
        dense.load(block)
        states = states_behind(dense, block)
        dense.unload(block)
    return states


def states_behind(dense: Stream, block: int) -> list[torch.Tensor]:
    """Take all batches through `block`, which is loaded; the hidden states that it returns, one tensor a batch."""
    found: dict[int, torch.Tensor] = {}

    def keep(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = original(*args, **kwargs)
        found[dense.current()] = hidden_states(output)
        return output

    dense.run_block(block, keep)
    return [found[number] for number in sorted(found)]


def _forward(model: StreamedModel, call: Call, batch: Batch) -> Forward:
    """The block's outputs for `batch`, real tokens alone."""
    mixed = model.dtype != torch.float32

    def forward() -> torch.Tensor:
        # The weights are float32 while they are trained.
        with torch.autocast(model.device.type, model.dtype) if mixed else nullcontext():
            return real_rows(hidden_states(call()), batch)

    return forward
