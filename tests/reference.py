"""Deliberately slow and simple versions of what the package does, written from the papers, to compare values with.

Nothing here shares code with the package. Weights are (out, in), loops are Python loops, sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def wanda_score(weight: torch.Tensor, sq_norm: torch.Tensor) -> torch.Tensor:
    return weight.abs() * sq_norm.sqrt()


def magnitude_score(weight: torch.Tensor, sq_norm: torch.Tensor) -> torch.Tensor:
    return weight.abs()


def keep_per_row(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Sort each row; of equal scores the lower column goes first."""
    keep = torch.ones_like(score, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        order = sorted(range(len(row)), key=lambda j: (row[j], j))
        for j in order[: math.floor(sparsity * len(row) + 1e-9)]:
            keep[i, j] = False
    return keep


def keep_per_tensor(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    return keep_per_row(score.reshape(1, -1), sparsity).reshape(score.shape)


def keep_n_of_m(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """N kept of every M consecutive inputs."""
    keep = torch.zeros_like(score, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        for start in range(0, len(row), m):
            order = sorted(range(start, start + m), key=lambda j: (row[j], j))
            for j in order[m - n :]:
                keep[i, j] = True
    return keep


def squared_norms(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """diag(X^T X) of the inputs of one map, one batch after the other."""
    total = torch.zeros(inputs[0].shape[-1], dtype=torch.float64)
    for tensor in inputs:
        total += tensor.reshape(-1, tensor.shape[-1]).double().pow(2).sum(0)
    return total.float()


def linear_maps(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def run_with_inputs(
    model: Any, batches: Sequence[torch.Tensor], maps: dict[str, nn.Linear | Conv1D]
) -> dict[str, list[torch.Tensor]]:
    """One whole forward of the model per batch; the inputs that each of `maps` saw."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in maps}
    hooks = [module.register_forward_pre_hook(_remember(seen[name])) for name, module in maps.items()]
    for batch in batches:
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def _remember(inputs: list[torch.Tensor]) -> Callable[[nn.Module, Any], None]:
    return lambda _module, args: inputs.append(args[0].detach().clone())


def _note(order: list[str], name: str) -> Callable[[nn.Module, Any], None]:
    return lambda _module, _args: order.append(name)


@torch.no_grad()
def prune_whole_model(
    model: Any,
    blocks: Sequence[nn.Module],
    batches: Sequence[torch.Tensor],
    score: Score,
    choose: Callable[[torch.Tensor], torch.Tensor],
    *,
    by: str,
) -> None:
    """Prune a model that lies in memory whole, in place, running all of it again for every step.

    by="block": the authors' protocol, all statistics of a block from its dense weights, earlier blocks pruned.
    by="sublayer": a map's statistics are taken when all maps that run before it are pruned.
    """
    for block in blocks:
        maps = linear_maps(block)
        if by == "block":
            seen = run_with_inputs(model, batches, maps)
            for name, inputs in seen.items():
                if inputs:
                    _prune_module(maps[name], inputs, score, choose)
        else:
            for name in _in_order_of_calls(model, batches[:1], maps):
                seen = run_with_inputs(model, batches, {name: maps[name]})
                _prune_module(maps[name], seen[name], score, choose)


def _in_order_of_calls(model: Any, batches: Sequence[torch.Tensor], maps: dict[str, nn.Linear | Conv1D]) -> list[str]:
    order: list[str] = []
    hooks = [module.register_forward_pre_hook(_note(order, name)) for name, module in maps.items()]
    for batch in batches:
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return order


def _prune_module(
    module: nn.Linear | Conv1D,
    inputs: Sequence[torch.Tensor],
    score: Score,
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    weight = module.weight.data
    matrix = weight.T if isinstance(module, Conv1D) else weight
    keep = choose(score(matrix.float(), squared_norms(inputs)))
    kept = torch.where(keep, matrix, torch.zeros_like(matrix))
    module.weight.data = kept.T.contiguous() if isinstance(module, Conv1D) else kept


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean over windows of a window's mean next-token loss."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0].double()
        log_probabilities = logits.log_softmax(-1)
        picked = [log_probabilities[t, window[t + 1]] for t in range(len(window) - 1)]
        losses.append(-sum(float(value) for value in picked) / len(picked))
    return math.exp(sum(losses) / len(losses))
