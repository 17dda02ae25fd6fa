"""The proof that units were found rightly: a block without them computes what the block does where they are zero."""

from __future__ import annotations

from typing import Any

import torch

from calibration.batch import Batch
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError, RequestError
from prune_cli.structured.units import WORDS, CoupledGroup, GroupName
from prune_cli.structured.width.checkpoint_views import SlicedCheckpoint
from prune_cli.structured.width.coupling import config_with, find_group, overridden_config

# A wrong guess misses by as much as the units add; rounding in float32 stays far below.
_TOLERANCE = 1e-3
_SAMPLES, _LENGTH = 2, 16


def verified_group(opened: OpenModel, name: GroupName, keep: int, *, with_overrides: bool = False) -> CoupledGroup:
    """The part whose removal was tried on a batch and made no difference beyond that of zeroing its units.

    Blocks of every kind are tried; with `sized`, in a model whose shapes are listed one by one. Raises RequestError
    where no reading of the tensors passes.
    """
    misses: list[float] = []
    fails: PruneError | None = None
    for group in find_group(opened, name, keep):
        try:
            misses.append(_difference(opened, group, with_overrides=with_overrides))
        except PruneError as error:
            fails = error
            continue
        if misses[-1] <= _TOLERANCE:
            return group
    if not misses and fails is not None:
        raise RequestError(
            f"{type(opened.model.model).__name__} does not run on a batch of any tokens, or not without some of its "
            f"{WORDS[name]}: {fails}"
        ) from fails
    raise RequestError(
        f"Removing {WORDS[name]} from {type(opened.model.model).__name__} changes what the others compute (by "
        f"{min(misses):.2g} of what the block adds, beyond zeroing them), as with norms over all heads or ALiBi: "
        + ("use -o parts=mlp." if name == "heads" else "this architecture cannot be narrowed so.")
    )


@torch.no_grad()
def _difference(opened: OpenModel, group: CoupledGroup, *, with_overrides: bool) -> float:
    """The largest relative difference over the blocks of every kind, with units taken out here and there."""
    random = torch.Generator().manual_seed(0)
    kept = {
        block: torch.randperm(group.units, generator=random)[: group.keep].sort().values for block in group.consumers
    }
    batch = Batch(torch.randint(opened.model.vocab_size, (_SAMPLES, _LENGTH), generator=random))
    output_sq = opened.with_checkpoint(opened.checkpoint, dtype=torch.float32)
    config = overridden_config(opened, [group]) if with_overrides else config_with(opened, group.changes)
    narrow = opened.with_checkpoint(
        SlicedCheckpoint(opened.checkpoint, group, opened.model.tensor_map, kept), config, dtype=torch.float32
    )
    worst = 0.0
    with Stream(output_sq, [batch]) as zeroed, Stream(narrow, [batch]) as without:
        for block in range(_last_new_kind(opened) + 1):
            tensors = zeroed.load(block)
            without.load(block)
            if block in group.consumers:
                consumer = group.consumers[block]
                weight = tensors[consumer].clone()
                cut = group.slices[consumer]
                gone = torch.ones(weight.shape[cut.axis], dtype=torch.bool)
                gone[cut.rows(kept[block], group.units)] = False
                weight.index_fill_(cut.axis, gone.nonzero().flatten(), 0)
                output_sq.set_weight(output_sq.tensor_map[consumer], weight)
            worst = max(worst, _relative(*zeroed.probe(block), without.probe(block)[1]))
            for each in (zeroed, without):
                each.run_block(block)
                each.unload(block)
    return worst


def _relative(before: torch.Tensor | None, zeroed: Any, without: Any) -> float:
    """How far apart two outputs of a block are, as a share of what it adds to its input."""
    zeroed, without = (output[0] if isinstance(output, tuple) else output for output in (zeroed, without))
    added = zeroed - before if before is not None and before.shape == zeroed.shape else zeroed
    return float((zeroed - without).norm() / added.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _last_new_kind(opened: OpenModel) -> int:
    """The last block that differs in its tensors' names or shapes from all before it."""
    seen: set[frozenset[tuple[str, tuple[int, ...]]]] = set()
    last = 0
    for index, block in enumerate(opened.model.blocks):
        kind = frozenset((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())
        last = index if kind not in seen else last
        seen.add(kind)
    return last
