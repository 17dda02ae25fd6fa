"""The rules for removing blocks as the papers state them, on a whole model in memory: slow, and meant to be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from prune_cli.model.architecture import find_blocks
from tests.round_trips import handing_on


@torch.no_grad()
def states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states (tokens, hidden) before each block, and last those that the last block returns."""
    _, blocks = find_blocks(model)
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in blocks
    ]
    hooks.append(
        blocks[-1].register_forward_hook(lambda *call: seen.append(call[2] if torch.is_tensor(call[2]) else call[2][0]))
    )
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [tensor.reshape(-1, tensor.shape[-1]).double() for tensor in seen]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / math.sqrt(float((a * a).sum())) / math.sqrt(float((b * b).sum())))


def influence(model: Any, ids: torch.Tensor) -> list[float]:
    """ShortGPT: 1 - the mean cosine between a block's input and output."""
    boundaries = states(model, ids)
    return [
        1 - sum(cosine(a, b) for a, b in zip(before, after, strict=True)) / len(before)
        for before, after in pairwise(boundaries)
    ]


def angular(model: Any, ids: torch.Tensor, count: int) -> list[float]:
    """Gromov et al.: the mean angle / pi between the ends of every run of `count` blocks."""
    boundaries = states(model, ids)
    found = []
    for first in range(len(boundaries) - count):
        angles = [
            math.acos(max(-1.0, min(1.0, cosine(a, b)))) / math.pi
            for a, b in zip(boundaries[first], boundaries[first + count], strict=True)
        ]
        found.append(sum(angles) / len(angles))
    return found


@torch.no_grad()
def loss_without(model: Any, ids: torch.Tensor, removed: Sequence[int]) -> float:
    """Mean over windows of the mean next-token loss, with the blocks `removed` handing on their input."""
    _, blocks = find_blocks(model)
    for index in removed:
        blocks[index].forward = handing_on(blocks[index].forward)
    losses = []
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        losses.append(float(torch.nn.functional.cross_entropy(logits[:-1].double(), row[1:])))
    for index in removed:
        del blocks[index].forward
    return sum(losses) / len(losses)


def greedy(model: Any, ids: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """The blocks in the order in which they go, and the loss after each."""
    removed: list[int] = []
    losses: list[float] = []
    _, blocks = find_blocks(model)
    for _ in range(count):
        tried = {
            block: loss_without(model, ids, [*removed, block]) for block in range(len(blocks)) if block not in removed
        }
        best = min(tried, key=lambda block: tried[block])
        removed.append(best)
        losses.append(tried[best])
    return removed, losses


@torch.no_grad()
def refitted_output_map(dense: Any, pruned: Any, ids: torch.Tensor, alpha: float, damping: float) -> torch.Tensor:
    """The o_proj of block 0 of a Llama that has lost its block 0, given all that comes before it in `pruned`.

    The W' that minimises ||alpha (X W^T + R) + (1 - alpha) X' W^T - X' W'^T||^2 + damping ||(W' - W) D||^2, where R is
    the difference of the residual streams before the two blocks, and D^2 holds the squared norms of the columns of X'.
    """
    inputs: list[torch.Tensor] = []
    maps = [dense.model.layers[1].self_attn.o_proj, pruned.model.layers[0].self_attn.o_proj]
    for each, model in zip(maps, (dense, pruned), strict=True):
        hook = each.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).double()))
        model(input_ids=ids, use_cache=False)
        hook.remove()
    weight = maps[0].weight.double()
    x, own = inputs
    lost = states(dense, ids)[1] - states(pruned, ids)[0]
    target = alpha * (x @ weight.T + lost) + (1 - alpha) * own @ weight.T
    gram = own.T @ own
    pull = damping * torch.diag(gram.diagonal())
    return ((target.T @ own + weight @ pull) @ torch.linalg.inv(gram + pull)).float()
