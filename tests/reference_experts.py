"""Deliberately slow and simple pruning of the experts of a block, from their inputs as the whole model brings them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

FEWEST = 32

# One call of the experts: hidden states (tokens, in), and the experts of each token (tokens, k).
Call = tuple[torch.Tensor, torch.Tensor]
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def experts_of(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if type(module).__name__.endswith("Experts")}


def calls_of(model: Any, batches: Sequence[torch.Tensor], module: nn.Module) -> list[Call]:
    """One whole forward of the model per batch; what `module` was called with."""
    seen: list[Call] = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(_call(module, args)))
    for batch in batches:
        model(input_ids=batch, use_cache=False)
    hook.remove()
    return seen


def _call(module: Any, args: Sequence[torch.Tensor]) -> Call:
    if len(args) > 1:
        return args[0].clone(), args[1].clone()
    # Llama 4: every token once for each expert, scaled by its weight there, mostly zero.
    rows = args[0].clone()
    tokens = len(rows) // module.num_experts
    sent = [at for at, row in enumerate(rows) if bool((row != 0).any())]
    return rows[sent], torch.tensor([[at // tokens] for at in sent])


def prune_experts(
    module: Any, calls: Sequence[Call], score: Score, choose: Callable[[torch.Tensor], torch.Tensor], *, by: str
) -> None:
    """Expert by expert: gate and up by the tokens sent to it, down by what the pruned two make of them.

    by="block": by what the dense two make of them. Below 32 tokens, all tokens count.
    """
    for expert in range(module.num_experts):
        batches = [hidden[[expert in row for row in chosen.tolist()]] for hidden, chosen in calls]
        if sum(len(rows) for rows in batches) < FEWEST:
            batches = [hidden for hidden, _ in calls]
        first, last = matrix(module, "gate_up_proj", expert), matrix(module, "down_proj", expert)
        dense = first.clone()
        _prune(first, batches, score, choose)
        between = [activation(module, rows, dense if by == "block" else first, expert) for rows in batches]
        _prune(last, between, score, choose)


def matrix(module: Any, name: str, expert: int) -> torch.Tensor:
    """(out, in), a view on the parameter."""
    weight = getattr(module, name).data[expert]
    return weight.T if type(module).__name__ in ("GptOssExperts", "Llama4TextExperts") else weight


def activation(module: Any, rows: torch.Tensor, first: torch.Tensor, expert: int) -> torch.Tensor:
    """(tokens, in of down): what the models' papers and code put between the two maps."""
    outputs = rows @ first.T
    if _is_gpt_oss(module):
        outputs = outputs + module.gate_up_proj_bias[expert]
        gate, up = outputs[:, 0::2].clamp(max=module.limit), outputs[:, 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * (gate * torch.sigmoid(module.alpha * gate))
    half = outputs.shape[1] // 2
    return module.act_fn(outputs[:, :half]) * outputs[:, half:]


def _is_gpt_oss(module: Any) -> bool:
    return type(module).__name__ == "GptOssExperts"


def _prune(
    weight: torch.Tensor,
    batches: Sequence[torch.Tensor],
    score: Score,
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    sq_norm = sum((rows.double().pow(2).sum(0) for rows in batches), torch.zeros(weight.shape[1], dtype=torch.float64))
    keep = choose(score(weight, sq_norm.float()))
    weight.copy_(torch.where(keep, weight, torch.zeros_like(weight)))


def removal_scores(module: Any, calls: Sequence[tuple[torch.Tensor, ...]], score: str) -> list[float]:
    """Of each expert for its removal, token by token; each call has hidden states, chosen experts and gates."""
    sums, counts = [0.0] * module.num_experts, [0] * module.num_experts
    for hidden, chosen, gates in calls:
        for token in range(len(hidden)):
            for expert, gate in zip(chosen[token].tolist(), gates[token].tolist(), strict=True):
                first, last = (matrix(module, name, expert) for name in ("gate_up_proj", "down_proj"))
                out = activation(module, hidden[token : token + 1], first, expert) @ last.T
                out = out + module.down_proj_bias[expert] if hasattr(module, "down_proj_bias") else out
                norm = float(out.double().norm())
                counts[expert] += 1
                sums[expert] += {"reap": gate * norm, "man": norm, "msan": norm**2, "frequency": 1.0}[score]
    return [s / max(c, 1) if score != "frequency" else s for s, c in zip(sums, counts, strict=True)]
