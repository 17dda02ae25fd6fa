"""Deliberately slow and simple versions of what the package does, written from the papers, to compare values with.

Nothing here shares code with the package. Weights are (out, in), loops are Python loops, sums are float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.reference_experts import calls_of, experts_of, prune_experts

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def wanda_score(weight: torch.Tensor, sq_norm: torch.Tensor) -> torch.Tensor:
    return weight.abs() * sq_norm.sqrt()


def magnitude_score(weight: torch.Tensor, sq_norm: torch.Tensor) -> torch.Tensor:
    return weight.abs()


def keep_per_row(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Sort each row; of equal scores the lower column goes first."""
    keep = []
    for row in score.tolist():
        order = sorted(range(len(row)), key=row.__getitem__)
        gone = set(order[: math.floor(sparsity * len(row) + 1e-9)])
        keep.append([j not in gone for j in range(len(row))])
    return torch.tensor(keep, dtype=torch.bool).reshape(score.shape)


def keep_per_tensor(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    return keep_per_row(score.reshape(1, -1), sparsity).reshape(score.shape)


def keep_n_of_m(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """N kept of every M consecutive inputs."""
    keep = []
    for row in score.tolist():
        kept = set()
        for start in range(0, len(row), m):
            kept |= set(sorted(range(start, start + m), key=row.__getitem__)[m - n :])
        keep.append([j in kept for j in range(len(row))])
    return torch.tensor(keep, dtype=torch.bool)


def squared_norms(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """diag(X^T X) of the inputs of one layer, one batch after the other."""
    total = torch.zeros(inputs[0].shape[-1], dtype=torch.float64)
    for tensor in inputs:
        total += tensor.reshape(-1, tensor.shape[-1]).double().pow(2).sum(0)
    return total.float()


def linear_layers(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """All but what routes."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith(("shared_expert_gate", "router"))
    }


def run_with_inputs(
    model: Any, batches: Sequence[torch.Tensor], layers: dict[str, nn.Linear | Conv1D]
) -> dict[str, list[torch.Tensor]]:
    """One whole forward of the model per batch; the inputs that each of `layers` saw."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [module.register_forward_pre_hook(_remember(seen[name])) for name, module in layers.items()]
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
    by="sublayer": a layer's statistics are taken when all layers that run before it are pruned.
    """
    for block in blocks:
        layers, experts = linear_layers(block), experts_of(block)
        if by == "block":
            seen = run_with_inputs(model, batches, layers)
            calls = {name: calls_of(model, batches, module) for name, module in experts.items()}
            for name, inputs in seen.items():
                if inputs:
                    _prune_module(layers[name], inputs, score, choose)
            for name, module in experts.items():
                prune_experts(module, calls[name], score, choose, by=by)
        else:
            for name in _in_order_of_calls(model, batches[:1], {**layers, **experts}):
                if name in experts:
                    prune_experts(experts[name], calls_of(model, batches, experts[name]), score, choose, by=by)
                    continue
                seen = run_with_inputs(model, batches, {name: layers[name]})
                _prune_module(layers[name], seen[name], score, choose)


def _in_order_of_calls(model: Any, batches: Sequence[torch.Tensor], layers: dict[str, nn.Module]) -> list[str]:
    order: list[str] = []
    hooks = [module.register_forward_pre_hook(_note(order, name)) for name, module in layers.items()]
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


def statistics(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """All statistics of inputs (tokens, in), straight from their definitions."""
    return {
        "sq_norm": inputs.square().sum(0),
        "mean": inputs.mean(0),
        "variance": inputs.var(0, unbiased=False),
        "gram": inputs.T @ inputs,
    }


def dsnot_row(
    row: dict[str, list[float]], keep: list[bool], of: int | None, cycles: int, threshold: float, stop: str
) -> list[bool]:
    """Prune-and-grow of one row, one exchange after the other; `row` has w, mean, variance and sq_norm."""
    w, variance = row["w"], row["variance"]
    lost = [a * b for a, b in zip(w, row["mean"], strict=True)]
    score = [abs(a) * math.sqrt(b) for a, b in zip(w, row["sq_norm"], strict=True)]
    pruned = [j for j, kept in enumerate(keep) if not kept]
    partners = {j for j, kept in enumerate(keep) if kept}
    error = sum(lost[j] for j in pruned)
    first_sign = math.copysign(1, error)
    limit = threshold * math.sqrt(error**2 + sum(w[j] ** 2 * variance[j] for j in pruned))
    keep = list(keep)
    for _ in range(cycles):
        candidates = [j for j in pruned if lost[j] * error > 0]
        if abs(error) <= limit or not candidates:
            break
        up = max(candidates, key=lambda j: abs(lost[j] / variance[j]))
        pruned.remove(up)
        there = [j for j in partners if lost[j] * error < 0 and (of is None or j // of == up // of)]
        if not there:
            if of is None:
                break
            continue
        down = min(there, key=lambda j: score[j])
        after = error + lost[down] - lost[up]
        estimated = after**2 - error**2 + w[down] ** 2 * variance[down] - w[up] ** 2 * variance[up]
        if (stop == "error" and estimated >= 0) or (stop == "sign" and math.copysign(1, after) != first_sign):
            break
        partners.remove(down)
        keep[up], keep[down], error = True, False, after
    return keep


def row_losses(weight: torch.Tensor, keep: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """(out,) ||X (w - w_kept)^T||^2 of every row in float64."""
    lost = weight.double() * ~keep
    return (inputs.double() @ lost.T).square().sum(0)


def helpful_swaps(
    weight: torch.Tensor, keep: torch.Tensor, inputs: torch.Tensor, of: int | None
) -> list[tuple[int, int, int]]:
    """Every (row, kept, pruned) whose exchange would lower the row's loss by more than rounding, by trying all."""
    found = []
    before = row_losses(weight, keep, inputs).tolist()
    for i in range(len(weight)):
        for p in range(weight.shape[1]):
            for u in range(weight.shape[1]):
                if keep[i, p] and not keep[i, u] and (of is None or p // of == u // of):
                    tried = keep[i : i + 1].clone()
                    tried[0, p], tried[0, u] = False, True
                    if row_losses(weight[i : i + 1], tried, inputs).item() < before[i] * (1 - 1e-3):
                        found.append((i, p, u))
    return found


def least_squares(weight: torch.Tensor, keep: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The best kept weights of every row for the outputs of the dense weights, by torch's solver in float64."""
    inputs = inputs.double()
    new = torch.zeros_like(weight, dtype=torch.float64)
    for i, row in enumerate(weight.double()):
        places = keep[i].nonzero()[:, 0]
        solution = torch.linalg.lstsq(inputs[:, places], (inputs @ row)[:, None], driver="gelsd").solution
        new[i, places] = solution[:, 0]
    return new


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, wanted: float | tuple[int, int], block: int, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal brain surgeon from left to right: the inverse over the columns that are left is computed anew each time.

    The mask of `block` columns is chosen at once, from the weights as they are when the block begins; `wanted` is a
    sparsity, or (n, m) for n kept of every m.
    """
    new, hessian = weight.double().clone(), gram.double().clone()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    rows, inputs = new.shape
    keep = torch.ones(rows, inputs, dtype=torch.bool)
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        loss = torch.stack(
            [new[:, j].square() / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(first, last)], dim=1
        )
        if isinstance(wanted, tuple):
            keep[:, first:last] = keep_n_of_m(loss, *wanted)
        else:
            # Counted over the whole tensor so far, so that no block's rounding is lost.
            count = math.floor(wanted * rows * last + 1e-9) - int((~keep).sum())
            order = loss.reshape(-1).sort(stable=True).indices[:count]
            keep[:, first:last] = ~torch.zeros(rows * (last - first)).bool().scatter(0, order, True).view(rows, -1)
        for j in range(first, last):
            inverse = torch.linalg.inv(hessian[j:, j:])
            error = torch.where(keep[:, j], 0.0, new[:, j] / inverse[0, 0])
            new[:, j:] -= error[:, None] * inverse[0]
    return keep, torch.where(keep, new, 0.0)


def damped_least_squares(weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Row by row min ||X (w - v)||^2 + damping ||D (w - v)||^2 over v on the kept places, D^2 = diag(G)."""
    damped = gram.double() + damping * torch.diag(gram.double().diagonal())
    new = torch.zeros_like(weight, dtype=torch.float64)
    for i, row in enumerate(weight.double()):
        places = keep[i].nonzero()[:, 0]
        new[i, places] = torch.linalg.solve(damped[places][:, places], (damped @ row)[places])
    return new


def lowest_row_loss(row: torch.Tensor, pruned: int, inputs: torch.Tensor) -> float:
    """The lowest loss of any mask of one row that prunes `pruned` weights, by trying all of them."""
    masks = torch.zeros(math.comb(len(row), pruned), len(row), dtype=torch.float64)
    for mask, places in zip(masks, itertools.combinations(range(len(row)), pruned), strict=True):
        mask[list(places)] = 1
    return float((inputs.double() @ (row * masks).T).square().sum(0).min())


def adam_with_a_mask(
    inputs: torch.Tensor,
    wanted: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    schedule: Any,
    generator: torch.Generator,
) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Adam (Kingma & Ba, algorithm 1) on y = gain * (x W^T), the zeros of W held: values and errors of every epoch.

    `inputs` (batches, tokens, in) and `wanted` (batches, tokens, out); the last two batches are held out.
    """
    inputs, wanted = inputs.double(), wanted.double()
    values = {"weight": weight.double(), "gain": gain.double()}
    keep = {name: value != 0 for name, value in values.items()}
    width = math.sqrt(weight.shape[0] * weight.shape[1])
    share = {"weight": schedule.rate * math.sqrt(256 / width), "gain": schedule.rate}
    rates = {
        name: share[name] * math.sqrt(float(v[keep[name]].square().sum()) / int(keep[name].sum()))
        for name, v in values.items()
    }
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    fitted = len(inputs) - 2
    size = float(wanted[:fitted].square().mean())
    step, epochs, errors = 0, [], []
    for _ in range(schedule.epochs):
        for at in torch.randperm(fitted, generator=generator).tolist():
            products = inputs[at] @ values["weight"].T
            missed = 2 * (products * values["gain"] - wanted[at]) / size
            gradients = {
                "weight": (missed * values["gain"]).T @ inputs[at],
                "gain": (missed * products).sum(0),
            }
            done = step / (schedule.epochs * fitted)
            fall = schedule.last + (1 - schedule.last) * (1 + math.cos(math.pi * done)) / 2
            step += 1
            for name, gradient in gradients.items():
                gradient = torch.where(keep[name], gradient, 0.0)
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.99 * second[name] + 0.01 * gradient.square()
                mean, spread = first[name] / (1 - 0.9**step), (second[name] / (1 - 0.99**step)).sqrt()
                values[name] = values[name] - rates[name] * fall * mean / (spread + 1e-8)
        missed = inputs[fitted:] @ values["weight"].T * values["gain"] - wanted[fitted:]
        errors.append(float(missed.square().sum() / wanted[fitted:].square().sum()))
        epochs.append(dict(values))
    return epochs, errors


def divergence_of_buckets(teacher: torch.Tensor, student: torch.Tensor, k: int) -> float:
    """KL in nats between two predictions (vocabulary,), tokens outside the teacher's `k` most probable taken as one."""
    p, q = (torch.exp(each.double()) / torch.exp(each.double()).sum() for each in (teacher, student))
    most = sorted(range(len(p)), key=lambda token: -float(p[token]))[:k]
    rest = [token for token in range(len(p)) if token not in most]
    pairs = [(float(p[token]), float(q[token])) for token in most]
    pairs.append((sum(float(p[token]) for token in rest), sum(float(q[token]) for token in rest)))
    return sum(ours * math.log(ours / theirs) for ours, theirs in pairs)
