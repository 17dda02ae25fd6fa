"""Writes the tensors of which some entries stay, block by block."""

from __future__ import annotations

import time

import torch

from prune_cli.output import OutputFolder
from prune_cli.progress import Progress
from prune_cli.structured.prepare import StructuredJob
from prune_cli.structured.stored_output import StoredOutput


def write_cuts(job: StructuredJob, stored: StoredOutput, output: OutputFolder, progress: Progress) -> None:
    """Fill the places of `stored.cuts`; blocks done before by an interrupted run are passed over."""
    by_block: dict[int, list[str]] = {}
    for name in stored.cuts:
        block = stored.block[name]
        by_block.setdefault(len(job.model.blocks) if block is None else block, []).append(name)
    if by_block:
        progress.stage("Writing what is left of tensors", len(by_block))
    for block, names in sorted(by_block.items()):
        if block not in output.done:
            begun = time.monotonic()
            tensors = {name: _cut(stored, name) for name in names}
            output.write_block(block, tensors, {"seconds": time.monotonic() - begun})
        progress.advance()
    output.wait()


def _cut(stored: StoredOutput, name: str) -> torch.Tensor:
    cut, tensor = stored.cuts[name], stored.source.read(stored.tensors[name].source)
    if tensor.dtype.itemsize > 1:
        return tensor.index_select(cut.axis, torch.tensor(cut.entries))
    # torch selects no entries of float8.
    return tensor.view(torch.uint8).index_select(cut.axis, torch.tensor(cut.entries)).view(tensor.dtype)
