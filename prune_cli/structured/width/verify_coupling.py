"""The proof that units were found rightly: a block without them computes what the block does where they are zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from calibration.batch import Batch
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError, RequestError
from prune_cli.structured.units import WORDS, CoupledGroup, GroupName
from prune_cli.structured.width.checkpoint_views import SlicedCheckpoint, ZeroedCheckpoint
from prune_cli.structured.width.coupling import config_with, find_group, overridden_config

# A wrong guess misses by as much as the units add; rounding in float32 stays far below.
_TOLERANCE = 1e-3
_SAMPLES, _LENGTH = 2, 16


def verified_group(opened: OpenModel, name: GroupName, keep: int, *, with_overrides: bool = False) -> CoupledGroup:
    """The group whose removal was tried on a batch and made no difference beyond that of zeroing its units.

    Blocks of every kind are tried; `with_overrides`, in a model whose shapes are listed one by one. Raises RequestError
    where no reading of the tensors passes.
    """
    choices = ((group,) for group in find_group(opened, name, keep))
    return verified_groups(opened, choices, with_overrides=with_overrides)[0]


def verified_groups(
    opened: OpenModel, choices: Iterable[tuple[CoupledGroup, ...]], *, with_overrides: bool = False
) -> tuple[CoupledGroup, ...]:
    """As `verified_group`, the first of `choices` that passes: groups that one change of the config narrows."""
    misses: list[float] = []
    fails: PruneError | None = None
    groups: tuple[CoupledGroup, ...] = ()
    for groups in choices:
        try:
            misses.append(_difference(opened, groups, with_overrides=with_overrides))
        except PruneError as error:
            fails = error
            continue
        if misses[-1] <= _TOLERANCE:
            return groups
    words = " and ".join(WORDS[group.name] for group in groups)
    if not misses and fails is not None:
        raise RequestError(
            f"{type(opened.model.model).__name__} does not run on a batch of any tokens, or not without some of its "
            f"{words}: {fails}"
        ) from fails
    raise RequestError(
        f"Removing {words} from {type(opened.model.model).__name__} changes what the others compute (by "
        f"{min(misses):.2g} of what the block adds, beyond zeroing them), as with norms over all heads or ALiBi: "
        + ("use -o parts=mlp." if "attention heads" in words else "this architecture cannot be narrowed so.")
    )


@torch.no_grad()
def _difference(opened: OpenModel, groups: tuple[CoupledGroup, ...], *, with_overrides: bool) -> float:
    """The largest relative difference over the blocks of every kind, with units taken out here and there."""
    random = torch.Generator().manual_seed(0)
    infos = opened.model.tensor_map
    kept = {group.name: {block: group.draw(random) for block in group.consumers} for group in groups}
    batch = Batch(torch.randint(opened.model.vocab_size, (_SAMPLES, _LENGTH), generator=random))
    config = overridden_config(opened, groups) if with_overrides else config_with(opened, groups[0].changes)
    zeros = ZeroedCheckpoint(opened.checkpoint, groups, infos, kept)
    whole = opened.with_checkpoint(zeros, dtype=torch.float32)
    narrow = opened.with_checkpoint(
        SlicedCheckpoint(opened.checkpoint, groups, infos, kept), config, dtype=torch.float32
    )
    worst = 0.0
    with Stream(whole, [batch]) as zeroed, Stream(narrow, [batch]) as without:
        for block in range(_last_new_kind(opened) + 1):
            for each in (zeroed, without):
                each.load(block)
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
