"""Which blocks of the teacher each block of a pruned model stands for, told from the weights alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from methods._alignment import align
from prune_cli.model.streamed_model import StreamedModel

# So many entries of a tensor, evenly spaced, tell whose it is.
_SAMPLED = 4096
_NUMBER = re.compile(r"\d+")


def counterparts(student: StreamedModel, teacher: StreamedModel) -> list[tuple[int, ...]]:
    """For every block of `student`, the run of the teacher's blocks up to the state that it is matched to.

    The first of each run is its own counterpart, those after it are gone; the runs together are all blocks in order
    (those that are gone before the first counterpart belong to the first run).
    """
    ours, theirs = len(student.blocks), len(teacher.blocks)
    own = list(range(ours)) if ours == theirs else align(_distances(student, teacher))
    begins, ends = [0, *own[1:]], [*own[1:], theirs]
    return [tuple(range(begin, end)) for begin, end in zip(begins, ends, strict=True)]


def _distances(student: StreamedModel, teacher: StreamedModel) -> torch.Tensor:
    """(blocks of student, blocks of teacher): ||s - t||^2 / (||s||^2 + ||t||^2) over weights that both have.

    Weights that pruning made zero, and tensors that it made smaller, tell nothing.
    """
    signs = [_signature(student, block) for block in range(len(student.blocks))]
    found = torch.zeros(len(student.blocks), len(teacher.blocks), dtype=torch.float64)
    for column in range(len(teacher.blocks)):
        theirs = _signature(teacher, column)
        for row, ours in enumerate(signs):
            found[row, column] = _distance(ours, theirs)
    return found


def _signature(model: StreamedModel, block: int) -> dict[str, torch.Tensor]:
    """Some entries of each tensor of a block, by its name and shape within the block."""
    signature: dict[str, torch.Tensor] = {}
    for name in model.block_names(block):
        info = model.tensor_map[name]
        if info.parameter is not None and info.entry.count:
            flat = model.checkpoint.read(name).reshape(-1)
            within = info.parameter.removeprefix(f"{model.blocks_name}.{block}.")
            expert = _NUMBER.findall(name) if info.expert is not None else ()
            key = f"{within} {expert[1:]} {info.entry.shape}"
            signature[key] = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].double()
    return signature


def _distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The mean over tensors; 1, as of weights that have nothing to do with each other, where none compares."""
    distances = []
    for key in ours.keys() & theirs.keys():
        kept = ours[key] != 0
        one, other = ours[key][kept], theirs[key][kept]
        size = float(one.square().sum() + other.square().sum())
        if size:
            distances.append(float((one - other).square().sum()) / size)
    return sum(sorted(distances)) / len(distances) if distances else 1.0
