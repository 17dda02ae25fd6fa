"""What is left takes over for blocks that are gone: one pass of two streams, the dense model's and the pruned one's."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from calibration.batch import Batch
from methods.structured import width
from prune_cli.checkpoint.layout import OutputTensor
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.run_context import Run
from prune_cli.engine.stream import Stream
from prune_cli.structured.depth.skip_block import Skipping
from prune_cli.structured.fit_block import BlockNarrower, NarrowedBlock, layers_and_biases
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure


def fitted_tensors(
    prepared: PreparedStructure, tensors: Mapping[str, OutputTensor], removed: Collection[int]
) -> dict[str, OutputTensor]:
    """Those of the output's `tensors` that get new values: linear layers behind the first removed block, and biases."""
    wanted = {
        name
        for block in range(min(removed), len(prepared.model.blocks))
        if block not in removed
        for name in layers_and_biases(prepared.model, block, prepared.model.linear_layers(block))
    }
    return {
        new: OutputTensor(old.source, prepared.model.tensor_map[old.source].entry.shape)
        for new, old in tensors.items()
        if old.source in wanted
    }


def refit(run: Run[PreparedStructure], change: StructuredPlan) -> StructuredPlan:
    """Write every block that `change` says is fitted, in order; returns the change with its notes.

    At each linear layer the least squares also make up for what the pruned stream has lost so far, where it adds to
    it: that is where the work of removed blocks is taken over. Raises PruneError naming a tensor that cannot be fitted.
    """
    prepared, output = run.plan, run.output
    names: dict[int, dict[str, str]] = {}
    for new, planned in change.tensors.items():
        block = prepared.model.tensor_map[planned.source].block
        if planned.shape is not None and block is not None:
            names.setdefault(block, {})[planned.source] = new
    refitter = _Refitter(prepared, change, names, output)
    if any(refitter.number[block] not in output.done for block in names):
        run.progress.stage(f"Refitting {len(names)} blocks", max(names) + 1)
        for _ in refitter.pass_blocks(run.batches()):
            run.progress.advance()
    output.wait()
    return replace(change, notes=(*change.notes, *_notes(refitter, output)))


@contextmanager
def two_streams(
    prepared: PreparedStructure, batches: Sequence[Batch], parking: ActivationOffload | None = None
) -> Iterator[tuple[Stream, Stream]]:
    """The pruned model's and the dense one's, before the first block."""
    with (
        Stream(prepared.model, batches, parking, prepared.ranks) as stream,
        Stream(prepared.with_checkpoint(prepared.checkpoint), batches, parking, prepared.ranks) as dense,
    ):
        yield stream, dense


def pass_both(
    stream: Stream, dense: Stream, end: int, removed: Collection[int], keep: Callable[[int, Stream, Stream], None]
) -> Iterator[None]:
    """The blocks before `end`: the pruned stream leaves out `removed`, and `keep` takes both through the others."""
    skipping = Skipping()
    for block in range(end):
        dense.load(block)
        if block in removed:
            dense.run_block(block, skipping.watching(block))
            if not skipping.knows(block):
                stream.load(block)
            stream.run_block(block, lambda original, args, kwargs, at=block: skipping.skip(at, original, args, kwargs))
        else:
            keep(block, stream, dense)
        stream.unload(block)
        dense.unload(block)
        yield


def fit_block(
    prepared: PreparedStructure, block: int, tensors: Mapping[str, torch.Tensor], stream: Stream, dense: Stream
) -> NarrowedBlock:
    """Fit all linear layers of `block`, loaded as `tensors`, while both streams pass it."""
    fits = width.Options(refit="all", alpha=prepared.options.alpha, damping=prepared.options.damping)
    return BlockNarrower(prepared.model, block, tensors, (), fits).run(stream, dense)


@dataclass
class _Refitter:
    """`names`: of every block to fit, the tensors that change, by their old names -> their new ones."""

    prepared: PreparedStructure
    change: StructuredPlan
    names: Mapping[int, Mapping[str, str]]
    output: OutputFolder

    @property
    def number(self) -> dict[int, int]:
        """The output's number of every kept block."""
        return {old: new for new, old in enumerate(self.change.blocks)}

    def pass_blocks(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Up to the last block to fit; a pair of blocks is in memory at a time."""
        removed = set(range(len(self.prepared.model.blocks))) - set(self.change.blocks)
        parking = ActivationOffload(self.output.partial, self.prepared.budget)
        with two_streams(self.prepared, batches, parking) as (stream, dense):
            yield from pass_both(stream, dense, max(self.names) + 1, removed, self._keep)

    def _keep(self, block: int, stream: Stream, dense: Stream) -> None:
        begun, new = time.monotonic(), self.number[block]
        if block not in self.names or new in self.output.done:
            stream.load(block, self._as_left(block) if block in self.names else None)
            dense.run_block(block)
            stream.run_block(block)
            return
        tensors = stream.load(block)
        result = fit_block(self.prepared, block, tensors, stream, dense)
        names = self.names[block]
        record: dict[str, Any] = {
            "seconds": time.monotonic() - begun,
            "output_errors": {names[name]: error for name, error in result.errors.items()},
            "notes": {names[name]: notes for name, notes in result.notes.items()},
            "makes_up": result.makes_up,
        }
        # A linear layer that no batch called stays as it was.
        changed = {new: result.tensors.get(name, tensors[name]) for name, new in names.items()}
        self.output.write_block(new, changed, record)

    def _as_left(self, block: int) -> Checkpoint:
        old = {planned.source: name for name, planned in self.change.tensors.items()}
        return RenamedCheckpoint(self.prepared.checkpoint, self.output.checkpoint(), old)


class RenamedCheckpoint(Checkpoint):
    """The tensors of `written`, an output with fewer blocks, under their names in `source` (old -> new in `names`)."""

    def __init__(self, source: Checkpoint, written: Checkpoint, names: Mapping[str, str]) -> None:
        super().__init__(source.folder, source.entries, source.files, source.index)
        self._written = written
        self._names = names

    def read(self, name: str) -> torch.Tensor:
        return self._written.read(self._names[name])


def _notes(refitter: _Refitter, output: OutputFolder) -> list[str]:
    """What the report says of the refit as a whole."""
    if not refitter.names:
        return ["Nothing was refitted: no kept block with linear layers stands behind the removed ones."]
    numbers = [new for old, new in refitter.number.items() if old in refitter.names]
    alone = [str(new) for new in numbers if not output.done[new]["makes_up"]]
    if not alone:
        return []
    return [
        f"In the output's blocks {', '.join(alone)} no layers add to the residual stream by themselves (experts, norms "
        "on outputs): their layers follow the dense ones' own outputs, and do not make up for removed blocks."
    ]
