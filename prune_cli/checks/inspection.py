"""`prune-cli inspect`: what is in a checkpoint, told from the safetensors alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import resolve_model
from prune_cli.model.open_checkpoint import open_to_look

if TYPE_CHECKING:
    import torch

_GROUPS = range(2, 33)
# A pattern counts as found when there are groups enough and nearly all of them keep just N: zeros that fell where they
# did make one only by chance. One group a row is no pattern, but rows that are all equally sparse.
_FEWEST = 32
_FULL = 0.9
_FULL_IN_SAMPLE = 0.7
_SAMPLE_ROWS = 64
_BLOCK = re.compile(r"(^|\.)\d+\.")
_EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|word_embeddings\w*|embeddings?)\.(\w+\.)*weight$|(^|\.)(wte|wpe)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|head)\.")


@dataclass(frozen=True)
class InspectedTensor:
    """`pattern` is N:M along dimension `axis` (1, or 0 for matrices stored (in, out)); None if none is found.

    `bytes` are those that it takes in its file; `encoding` is how sparse safetensors or a packed model store it, None
    for plain numbers.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    zeros: int | None
    sparsity: float | None
    pattern: str | None
    axis: int | None
    encoding: str | None


@dataclass(frozen=True)
class Total:
    part: str
    tensors: int
    parameters: int
    bytes: int
    zeros: int
    sparsity: float


@dataclass(frozen=True)
class FormatTotal:
    """The weights that are stored in the same form, if not as plain numbers; zeros are counted in their values."""

    format: str
    tensors: int
    parameters: int
    bytes: int
    bits_per_weight: float
    zeros: int
    sparsity: float


@dataclass(frozen=True)
class Inspection:
    """`absent` are tensors that the index names and no file holds, with the file that it says."""

    model: str
    revision: str | None
    files: Sequence[str]
    totals: Sequence[Total]
    formats: Sequence[FormatTotal]
    tensors: Sequence[InspectedTensor]
    absent: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def inspect_model(given: str, revision: str | None = None) -> Inspection:
    """Look at every tensor of a checkpoint, one at a time. Raises RequestError for one that cannot be opened."""
    source = resolve_model(given, revision)
    checkpoint = open_to_look(source.folder)
    tensors = [_inspect(checkpoint, name) for name in checkpoint.entries]
    parts = ("embeddings", "blocks", "head", "other")
    totals = [_total(part, [t for t in tensors if part_of(t.name) == part]) for part in parts]
    return Inspection(
        model=given,
        revision=source.revision,
        files=checkpoint.files,
        totals=[total for total in totals if total.tensors] + [_total("all", tensors)],
        formats=_formats(tensors),
        tensors=tensors,
        absent=checkpoint.absent,
    )


def part_of(name: str) -> str:
    """Embeddings, blocks, head or other, told by the name: a number in it means a block."""
    if _BLOCK.search(name):
        return "blocks"
    if _HEAD.search(name):
        return "head"
    return "embeddings" if _EMBEDDING.search(name) and "norm" not in name.lower() else "other"


def _inspect(checkpoint: Checkpoint, name: str) -> InspectedTensor:
    entry = checkpoint.entries[name]
    nbytes, encoding = checkpoint.storage(name)
    zeros = pattern = axis = None
    if entry.dtype in FLOATS:
        nonzero = checkpoint.read(name) != 0
        zeros = entry.count - int(nonzero.count_nonzero())
        if zeros and nonzero.ndim == 2:
            pattern, axis = find_pattern(nonzero)
    return InspectedTensor(
        name=name,
        file=entry.file,
        shape=entry.shape,
        dtype=entry.dtype,
        parameters=entry.count,
        bytes=nbytes,
        zeros=zeros,
        sparsity=zeros / entry.count if zeros is not None and entry.count else None,
        pattern=pattern,
        axis=axis,
        encoding=encoding,
    )


def find_pattern(nonzero: torch.Tensor) -> tuple[str | None, int | None]:
    """The N:M of the smallest M that a boolean matrix keeps along its last or, failing that, its first dimension."""
    for axis, matrix in ((1, nonzero), (0, nonzero.T)):
        rows, columns = matrix.shape
        some_rows = matrix[:: max(1, rows // _SAMPLE_ROWS)]
        for of in _GROUPS:
            if columns % of or columns < 2 * of or matrix.numel() < _FEWEST * of:
                continue
            # Nearly always the sample settles it, without a pass over the whole matrix.
            most, full = _groups(some_rows, of)
            if most < of and full >= _FULL_IN_SAMPLE:
                most, full = _groups(matrix, of)
                if 0 < most < of and full >= _FULL:
                    return f"{most}:{of}", axis
    return None, None


def _groups(matrix: torch.Tensor, of: int) -> tuple[int, float]:
    """The most places that a group of `of` columns keeps, and the share of the groups that keep as many."""
    import torch

    kept = matrix.reshape(-1, of).sum(1, dtype=torch.int32)
    most = int(kept.max())
    return most, float((kept == most).float().mean())


def _formats(tensors: Sequence[InspectedTensor]) -> list[FormatTotal]:
    packed = [tensor for tensor in tensors if tensor.encoding is not None]
    totals = [
        (label, _total(label, [tensor for tensor in packed if tensor.encoding == label]))
        for label in dict.fromkeys(tensor.encoding for tensor in packed if tensor.encoding)
    ]
    return [
        FormatTotal(label, t.tensors, t.parameters, t.bytes, 8 * t.bytes / max(1, t.parameters), t.zeros, t.sparsity)
        for label, t in totals
    ]


def _total(part: str, tensors: Sequence[InspectedTensor]) -> Total:
    parameters = sum(tensor.parameters for tensor in tensors)
    zeros = sum(tensor.zeros or 0 for tensor in tensors)
    return Total(
        part=part,
        tensors=len(tensors),
        parameters=parameters,
        bytes=sum(tensor.bytes for tensor in tensors),
        zeros=zeros,
        sparsity=zeros / parameters if parameters else 0.0,
    )
