"""CFSP and FLAP as their papers state them, in memory: what --method width is measured against.

Both look at the dense model once. CFSP spreads the budget by the blocks' angles and refits nothing; FLAP takes the
units of the lowest standardised fluctuation in the whole model and puts what they gave on average into biases, which
most architectures have to be given. Units are set to zero, which computes the same as removing them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from calibration.statistics import Average, SquaredNorm, Variance, mean
from methods.structured._refit import bias_of_removed
from methods.structured._scores import cfsp, flap
from methods.structured._sizes import coarse_shares, proportional_sizes
from methods.structured._units import Units, highest, inputs_of
from prune_cli.engine.open_model import open_model
from prune_cli.request.request import PruneRequest
from prune_cli.structured.units import CoupledGroup, GroupName
from prune_cli.structured.width.coupling import unit_count
from prune_cli.structured.width.verify_coupling import verified_group

_BATCH = 8


@dataclass
class Known:
    """Of one block: the map that reads the units, the units, and the dense model's statistics of its inputs."""

    reader: nn.Linear
    units: Units
    norm: SquaredNorm
    variance: Variance
    mean: Average
    angle: float = 0.0
    tokens: int = 0


@torch.no_grad()
def pruned_by_paper(folder: Path, ids: torch.Tensor, rule: str, part_name: GroupName, share: float) -> nn.Module:
    """The dense model of `folder` with units at zero, chosen on `ids` by `rule`: cfsp or flap."""
    opened = open_model(PruneRequest(model=str(folder), out=folder.parent / "unused", method="magnitude"), writes=False)
    units = unit_count(opened, part_name)
    part = verified_group(opened, part_name, max(1, round((1 - share) * units)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    known = [_look(opened, model, part, block) for block in sorted(part.consumers)]
    hooks = [each.reader.register_forward_pre_hook(_statistics(each)) for each in known]
    blocks = cast("nn.ModuleList", model.get_submodule(opened.model.blocks_name))
    hooks += [
        blocks[block].register_forward_hook(_angle(each))
        for block, each in zip(sorted(part.consumers), known, strict=True)
    ]
    for batch in ids.split(_BATCH):
        model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    kept = _cfsp(known, share) if rule == "cfsp" else _flap(known, share)
    for each, units_kept in zip(known, kept, strict=True):
        _zero(each, units_kept, with_bias=rule == "flap")
    return model


def _look(opened, model, part: CoupledGroup, block: int) -> Known:
    infos = opened.model.tensor_map
    reader = model.get_submodule(infos[part.consumers[block]].module_name)
    producers = []
    for name in part.producers(block, infos):
        weight = model.get_parameter(infos[name].parameter)
        begin = 0
        for rows in part.slices[name].sections:
            producers.append(weight[begin : begin + part.units * rows].view(part.units, rows, -1))
            begin += part.units * rows
    inputs, cpu = reader.weight.shape[1], torch.device("cpu")
    statistics = SquaredNorm(inputs, cpu), Variance(inputs, cpu), Average(inputs, cpu, mean)
    return Known(reader, Units(reader.weight.clone(), tuple(producers), part.width), *statistics)


def _statistics(known: Known):
    def take(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        for accumulator in (known.norm, known.variance, known.mean):
            accumulator.add(rows)

    return take


def _angle(known: Known):
    def take(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        after = output[0] if isinstance(output, tuple) else output
        cosines = torch.cosine_similarity(inputs[0].double(), after.double(), dim=-1).clamp(-1, 1)
        known.angle += float((cosines.arccos() / torch.pi).sum())
        known.tokens += cosines.numel()

    return take


def _cfsp(known: list[Known], share: float) -> list[torch.Tensor]:
    counts = [each.units.count for each in known]
    shares = coarse_shares(torch.tensor([each.angle / each.tokens for each in known]))
    sizes = proportional_sizes(shares, counts, round((1 - share) * sum(counts)), 1)
    return [highest(cfsp(e.units, {"sq_norm": e.norm.value()}), size) for e, size in zip(known, sizes, strict=True)]


def _flap(known: list[Known], share: float) -> list[torch.Tensor]:
    scores = torch.stack([flap(each.units, {"variance": each.variance.value()}) for each in known])
    standardised = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[highest(standardised.flatten(), round((1 - share) * scores.numel()))] = True
    return [row.nonzero().flatten() for row in keep.view_as(scores)]


def _zero(known: Known, kept: torch.Tensor, *, with_bias: bool) -> None:
    columns = inputs_of(kept, known.units.width)
    weight = torch.zeros_like(known.units.consumer)
    weight[:, columns] = known.units.consumer[:, columns]
    known.reader.weight.copy_(weight)
    if with_bias:
        lost = bias_of_removed(known.units.consumer, known.mean.value(), columns)
        old = known.reader.bias
        known.reader.bias = nn.Parameter(lost if old is None else old + lost, requires_grad=False)


@torch.no_grad()
def loss_of(model: nn.Module, windows: torch.Tensor) -> float:
    """The mean over windows of the mean next-token loss, in nats."""
    losses = []
    for batch in windows.split(_BATCH):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) * len(batch))
    return float(sum(losses)) / len(windows)
