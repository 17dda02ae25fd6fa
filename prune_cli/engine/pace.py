"""How long the model's own work takes here: told from its size, or measured on a batch of random tokens."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from calibration.batch import Batch
from prune_cli.engine.open_model import OpenModel, pick_batch_size, usual_length
from prune_cli.engine.stream import Stream
from prune_cli.model.streamed_model import StreamedModel

# What a machine does in a second, where only the shares of a run count: multiplications, bytes read and hashed.
_MULTIPLICATIONS, _BYTES = 2e10, 5e8
# Kinds of blocks that come late may be left to those before; so many seconds are spent on looking for them.
_SECONDS_ON_BLOCKS = 3.0
_COLUMNS_OF_HEAD = 1 << 13
_HASHED_BYTES = 1 << 26
_SIDE = 512
# Multiplications of about a second, on a CPU and elsewhere; and tokens that are measured in any case.
_WORK, _FEWEST_TOKENS = (20_000_000_000, 2_000_000_000_000), 64
# Each byte of an output is read, hashed and looked at, and written.
_STEPS_OF_A_COPY = 2


@dataclass(frozen=True)
class Pace:
    """Seconds: of a token through all blocks, of its logits and loss, of loading all blocks once, of a byte copied.

    `multiplication`: of a multiplication in a product of float32 matrices.
    """

    block: float
    head: float
    load: float
    copy: float
    multiplication: float


def usual_pace(model: StreamedModel) -> Pace:
    """From the numbers of parameters alone; right in proportion, not in seconds."""
    blocks = sum(info.entry.count for info in model.tensor_map.values() if info.block is not None)
    head = model.vocab_size * model.hidden_size
    nbytes = model.checkpoint.nbytes
    return Pace(blocks / _MULTIPLICATIONS, head / _MULTIPLICATIONS, nbytes / _BYTES, 1 / _BYTES, 1 / _MULTIPLICATIONS)


def measured_pace(opened: OpenModel) -> Pace:
    """One batch of random tokens through a block of each kind, a part of the head, the hash of a part of the files."""
    windows = probe_windows(opened)
    block, load = _of_blocks(opened, windows)
    return Pace(block, _of_head(opened, windows.length), load, _of_copy(opened), _of_product(opened.device))


def probe_windows(opened: OpenModel) -> Batch:
    """A batch as the run has them, or as much of one as a block passes in a second; the same ids every time."""
    length, vocabulary = usual_length(opened), opened.model.vocab_size
    rows = pick_batch_size(opened.request.batch_size, opened.device, length)
    most = max(_FEWEST_TOKENS, _WORK[opened.device.type != "cpu"] // max(_counts(opened)))
    shape = (max(1, min(rows, most // length)), min(length, most))
    # The ends of a vocabulary have tokens that stand for images and the like.
    low, high = vocabulary // 4, max(vocabulary // 2, vocabulary // 4 + 1)
    return Batch(torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)))


def _counts(opened: OpenModel) -> list[int]:
    """Parameters of each block."""
    entries = opened.checkpoint.entries
    blocks = range(len(opened.model.blocks))
    return [sum(entries[name].count for name in opened.model.block_names(block)) for block in blocks]


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """With all that it has the device do."""
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


@torch.no_grad()
def _of_blocks(opened: OpenModel, windows: Batch) -> tuple[float, float]:
    """Seconds of a token through all blocks, and of loading them; those of a kind not reached go by parameters."""
    blocks, begun = range(len(opened.model.blocks)), time.perf_counter()
    kinds = [_kind(opened, block) for block in blocks]
    forward: dict[Hashable, float] = {}
    load: dict[Hashable, float] = {}
    with Stream(opened.model, [windows]) as stream:
        for block in blocks:
            took = seconds_of(lambda block=block: stream.load(block), opened.device)
            if kinds[block] not in forward:
                for call in stream.calls():
                    call()  # the first one also touches memory that was never used
                load[kinds[block]] = took
                forward[kinds[block]] = seconds_of(lambda block=block: stream.run_block(block), opened.device)
            else:
                stream.run_block(block)
            stream.unload(block)
            if forward.keys() == set(kinds) or time.perf_counter() - begun > _SECONDS_ON_BLOCKS:
                break
    return _over_all(opened, kinds, forward) / windows.tokens, _over_all(opened, kinds, load)


def _kind(opened: OpenModel, block: int) -> Hashable:
    """Blocks of one kind have tensors of the same shapes."""
    entries = opened.checkpoint.entries
    return tuple(entries[name].shape for name in opened.model.block_names(block))


def _over_all(opened: OpenModel, kinds: list[Hashable], seconds: dict[Hashable, float]) -> float:
    counts = _counts(opened)
    seen = [(count, seconds[kind]) for count, kind in zip(counts, kinds, strict=True) if kind in seconds]
    of_parameter = sum(each for _, each in seen) / sum(count for count, _ in seen)
    return sum(seconds.get(kind, of_parameter * count) for count, kind in zip(counts, kinds, strict=True))


def _of_head(opened: OpenModel, tokens: int) -> float:
    """Seconds of a token's logits and loss."""
    vocabulary, like = opened.model.vocab_size, {"dtype": opened.dtype, "device": opened.device}
    columns = min(vocabulary, _COLUMNS_OF_HEAD)
    head, states = (torch.ones(rows, opened.model.hidden_size, **like) for rows in (columns, tokens))
    targets = torch.zeros(tokens, dtype=torch.long, device=opened.device)

    def predict() -> torch.Tensor:
        return torch.nn.functional.cross_entropy((states @ head.T).float(), targets)

    predict()
    return seconds_of(predict, opened.device) * vocabulary / columns / tokens


def _of_product(device: torch.device) -> float:
    matrix = torch.ones(_SIDE, _SIDE, device=device)
    seconds_of(lambda: matrix @ matrix, device)
    return seconds_of(lambda: matrix @ matrix, device) / _SIDE**3


def _of_copy(opened: OpenModel) -> float:
    checkpoint = opened.checkpoint
    with (checkpoint.folder / checkpoint.files[0]).open("rb") as file:
        begun = time.perf_counter()
        read = file.read(_HASHED_BYTES)
        hashlib.sha256(read)
    return _STEPS_OF_A_COPY * (time.perf_counter() - begun) / max(len(read), 1)
