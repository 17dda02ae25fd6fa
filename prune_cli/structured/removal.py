"""The proof that units were found rightly: a block without them computes what the block does where they are zero."""

from __future__ import annotations

from typing import Any

import torch

from calibration.batch import Batch
from prune_cli.errors import RequestError
from prune_cli.prepare import Opened
from prune_cli.stream import Stream
from prune_cli.structured.coupling import WORDS, Part, PartName, config_with, find_part, sized_config
from prune_cli.structured.narrow import Narrowed

# A wrong guess misses by as much as the units add; rounding in float32 stays far below.
_TOLERANCE = 1e-3
_SAMPLES, _LENGTH = 2, 16


def proven_part(job: Opened, name: PartName, keep: int, *, sized: bool = False) -> Part:
    """The part whose removal was tried on a batch and made no difference beyond that of zeroing its units.

    Blocks of every kind are tried; with `sized`, in a model whose shapes are listed one by one. Raises RequestError
    where no reading of the tensors passes.
    """
    misses: list[float] = []
    for part in find_part(job, name, keep):
        misses.append(_difference(job, part, sized=sized))
        if misses[-1] <= _TOLERANCE:
            return part
    raise RequestError(
        f"Removing {WORDS[name]} from {type(job.model.model).__name__} changes what the others compute (by "
        f"{min(misses):.2g} of what the block adds, beyond zeroing them), as with norms over all heads or ALiBi: "
        + ("use -o parts=mlp." if name == "heads" else "this architecture cannot be narrowed so.")
    )


@torch.no_grad()
def _difference(job: Opened, part: Part, *, sized: bool) -> float:
    """The largest relative difference over the blocks of every kind, with units taken out here and there."""
    random = torch.Generator().manual_seed(0)
    kept = {block: torch.randperm(part.units, generator=random)[: part.keep].sort().values for block in part.consumers}
    batch = Batch(torch.randint(job.model.vocab_size, (_SAMPLES, _LENGTH), generator=random))
    whole = job.with_checkpoint(job.checkpoint, dtype=torch.float32)
    config = sized_config(job, [part]) if sized else config_with(job, part.changes)
    narrow = job.with_checkpoint(Narrowed(job.checkpoint, part, job.model.places, kept), config, dtype=torch.float32)
    worst = 0.0
    with Stream(whole, [batch]) as zeroed, Stream(narrow, [batch]) as without:
        for block in range(_last_new_kind(job) + 1):
            tensors = zeroed.load(block)
            without.load(block)
            if block in part.consumers:
                consumer = part.consumers[block]
                weight = tensors[consumer].clone()
                cut = part.cuts[consumer]
                gone = torch.ones(weight.shape[cut.axis], dtype=torch.bool)
                gone[cut.rows(kept[block], part.units)] = False
                weight.index_fill_(cut.axis, gone.nonzero().flatten(), 0)
                whole.set_weight(whole.places[consumer], weight)
            worst = max(worst, _relative(*zeroed.probe(block), without.probe(block)[1]))
            for each in (zeroed, without):
                each.through(block)
                each.unload(block)
    return worst


def _relative(before: torch.Tensor | None, zeroed: Any, without: Any) -> float:
    """How far apart two outputs of a block are, as a share of what it adds to its input."""
    zeroed, without = (output[0] if isinstance(output, tuple) else output for output in (zeroed, without))
    added = zeroed - before if before is not None and before.shape == zeroed.shape else zeroed
    return float((zeroed - without).norm() / added.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _last_new_kind(job: Opened) -> int:
    """The last block that differs in its tensors' names or shapes from all before it."""
    seen: set[frozenset[tuple[str, tuple[int, ...]]]] = set()
    last = 0
    for index, block in enumerate(job.model.blocks):
        kind = frozenset((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())
        last = index if kind not in seen else last
        seen.add(kind)
    return last
