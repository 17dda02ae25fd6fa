"""Writes the tensors of which some entries stay, block by block."""

from __future__ import annotations

import time

import torch

from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.progress import Progress
from prune_cli.structured.plan import Change
from prune_cli.structured.prepare import StructuredJob


def write_cuts(job: StructuredJob, change: Change, output: OutputFolder, progress: Progress) -> None:
    """Fill the places of `change.cuts`; blocks done before by an interrupted run are passed over."""
    by_block: dict[int, list[str]] = {}
    for name in change.cuts:
        block = job.model.places[change.tensors[name].source].block
        by_block.setdefault(len(job.model.blocks) if block is None else block, []).append(name)
    if by_block:
        progress.stage("Writing what is left of tensors", len(by_block))
    for block, names in sorted(by_block.items()):
        if block not in output.done:
            begun = time.monotonic()
            tensors = {name: _cut(job, change, name) for name in names}
            output.write_block(block, tensors, {"seconds": time.monotonic() - begun})
        progress.advance()
    output.wait()


def _cut(job: StructuredJob, change: Change, name: str) -> torch.Tensor:
    cut = change.cuts[name]
    return job.checkpoint.read(change.tensors[name].source).index_select(cut.axis, torch.tensor(cut.entries))
