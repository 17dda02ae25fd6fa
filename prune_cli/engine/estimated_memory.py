"""How much memory a run takes, estimated before it, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from prune_cli.engine.eval_windows import evaluation_memory
from prune_cli.engine.memory import LARGE_INPUTS, gram_bytes
from prune_cli.engine.open_model import OpenModel

# torch, transformers and their tables; measured as anonymous memory after importing them.
_LIBRARIES = 400 << 20
# Paused forward passes keep the embeddings, the block's input and the residual between; in attention, instead of the
# last, queries, keys and values.
_STATES_BESIDE_WIDEST, _STATES_IN_ATTENTION = 3, 5


@dataclass(frozen=True)
class LayersSolved:
    """Layers that get zeros or new values: weights of the largest, inputs of the widest, Gram matrices or none."""

    largest: int = 0
    widest: int = 0
    gram: bool = False


@dataclass(frozen=True)
class PeakBytes:
    """`device` is None on a CPU."""

    host: int
    device: int | None


def peak_bytes(opened: OpenModel, given: int | None, work: int) -> PeakBytes:
    """Of a run that takes `work` beside the libraries and, from `given` calibration tokens on, perhaps evaluates."""
    work = max(work, evaluation_memory(opened, given))
    largest = max(_block_bytes(opened, index, stored=True) for index in range(len(opened.model.blocks)))
    if opened.device.type == "cpu":
        return PeakBytes(_LIBRARIES + largest + work, None)
    return PeakBytes(_LIBRARIES + largest, work)


def working_memory(opened: OpenModel, tokens: int | None, streams: int, layers: LayersSolved) -> int:
    """Weights of a block as computed with, its largest layer a few times over, Gram matrices, paused hidden states."""
    itemsize, hidden = opened.dtype.itemsize, opened.model.hidden_size
    if tokens is None:
        return 4 * 4 * layers.largest
    block = max(_block_bytes(opened, index, stored=False) for index in range(len(opened.model.blocks)))
    outside = sum(_outside(opened)) * itemsize
    one, inputs = (tokens * width * itemsize for width in (hidden, layers.widest))
    limit = LARGE_INPUTS if opened.device.type == "cpu" else inputs + one  # the others wait in files
    states = max(
        _STATES_BESIDE_WIDEST * one + min(inputs, limit),
        _STATES_IN_ATTENTION * one + 2 * min(one, limit),
    )
    gram = gram_bytes(layers.widest, streams) if layers.gram else 0
    copies = (4 if gram == 0 else 8) * 4 * layers.largest
    drift = (streams - 1) * tokens * hidden * itemsize
    return max(streams * outside, streams * block + copies + gram) + streams * states + drift


def _outside(opened: OpenModel) -> list[int]:
    return [
        info.entry.count
        for info in opened.model.tensor_map.values()
        if info.block is None and info.parameter and info.role != "output head"
    ]


def _block_bytes(opened: OpenModel, index: int, *, stored: bool) -> int:
    entries = [opened.checkpoint.entries[name] for name in opened.model.block_names(index)]
    return sum(entry.nbytes if stored else entry.count * opened.dtype.itemsize for entry in entries)
