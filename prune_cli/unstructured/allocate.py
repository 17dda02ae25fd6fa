"""Chooses how much each tensor of the blocks gives, before any is pruned; one outside them gives what was asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from methods._allocation import (
    ScoreHistogram,
    arithmetic,
    erk,
    outlier_share,
    owl,
    steepest_slope,
)
from methods._pattern import Unstructured
from prune_cli.engine.evaluate import by_tokens, window_losses
from prune_cli.engine.expert_inputs import at_experts, experts_by_module
from prune_cli.engine.input_statistics import InputStatistics
from prune_cli.engine.run_context import Run
from prune_cli.engine.stream import Stream
from prune_cli.model.orientation import as_matrix, matrix_shape
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.request.allocation import Allocation
from prune_cli.request.pipeline import make_pipeline
from prune_cli.unstructured.allocate_by_outputs import OutputScores
from prune_cli.unstructured.plan import ROLES_WITH_INPUTS
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.prune_block import BlockPruner, prune_block
from prune_cli.unstructured.prune_experts import expert_scores
from prune_cli.unstructured.prune_linear import Settings


def allocate(run: Run[PruningPlan], scores: OutputScores | None) -> Allocation:
    """The table for every tensor to prune: its parameter-weighted mean is the asked sparsity.

    `scores` are there for the allocation by sensitivities.
    """
    plan, strategy, options = run.plan, run.request.allocation, run.request.allocation_options()
    asked = plan.pattern.sparsity
    flat = dict.fromkeys(plan.pruned_names(), asked)
    inside = {name: info for name, info in plan.pruned_infos().items() if info.block is not None}
    if plan.allocation_file is not None:
        table, facts = plan.allocation_file, {}
    elif strategy == "uniform" or not inside:
        table, facts = {}, {}
    elif strategy == "erk":
        shapes = {name: matrix_shape(info) for name, info in inside.items()}
        table, facts = erk(shapes, asked, {name: info.entry.count for name, info in inside.items()}), {}
    elif strategy == "owl":
        table, facts = _owl(run, options)
    elif strategy == "atp":
        table, facts = _atp(run, options)
    elif scores is not None:
        table, facts = scores.sparsities(asked, {name: info.entry.count for name, info in inside.items()}), {}
    else:
        table, facts = _global(run, list(inside))
    return Allocation(strategy, asdict(options), {**flat, **table}, facts)


def _owl(run: Run[PruningPlan], options: Any) -> tuple[dict[str, float], dict[str, Any]]:
    plan = run.plan
    shares: dict[str, float] = {}
    run.progress.stage("Measuring outliers", len(plan.model.blocks))
    for block, scores in _dense_scores(run):
        if scores:
            shares[str(block)] = outlier_share(list(scores.values()), options.outlier)
    by_block = owl(shares, _block_counts(plan), plan.pattern.sparsity, options.spread)
    return _for_tensors(plan, by_block), {"outlier_shares": shares}


def _atp(run: Run[PruningPlan], options: Any) -> tuple[dict[str, float], dict[str, Any]]:
    plan, asked = run.plan, run.plan.pattern.sparsity
    counts = _block_counts(plan)
    if options.slope is not None:
        return _for_tensors(plan, arithmetic(counts, asked, options.slope)), {}
    steepest = steepest_slope(len(counts), asked)
    slopes = [steepest * step / options.candidates for step in range(options.candidates)]
    losses = {}
    for at, slope in enumerate(slopes):
        run.progress.stage(f"Trying slope {at + 1} of {len(slopes)}", len(plan.pruned_names()))
        losses[slope] = _loss_after_wanda(run, _for_tensors(plan, arithmetic(counts, asked, slope)))
    best = min(losses, key=losses.__getitem__)
    facts = {"slope": best, "tried": [{"slope": slope, "calibration_loss": loss} for slope, loss in losses.items()]}
    return _for_tensors(plan, arithmetic(counts, asked, best)), facts


def _global(run: Run[PruningPlan], inside: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """One threshold on |W|, or where the method reads inputs on Wanda scores over their root mean square per tensor."""
    plan = run.plan
    histogram = ScoreHistogram()
    run.progress.stage("Measuring scores", len(plan.model.blocks))
    if plan.pipeline.needs:
        for _, scores in _dense_scores(run):
            for name, score in scores.items():
                histogram.add(name, score / score.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny))
    else:
        for name in inside:
            histogram.add(name, plan.checkpoint.read(name).float().abs())
    return histogram.sparsities(plan.pattern.sparsity), {}


def _dense_scores(run: Run[PruningPlan]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Block by block the Wanda scores (out, in) of its linear layers to prune, on the dense model's own inputs."""
    plan = run.plan
    with Stream(plan.model, run.batches(), ranks=plan.ranks) as stream:
        for block in range(len(plan.model.blocks)):
            tensors = stream.load(block)
            infos = _with_inputs(plan, block)
            experts = experts_by_module(infos)
            scores: dict[str, torch.Tensor] = {}
            norm = torch.empty(0)
            for name, inputs in stream.pause_at(block, list(infos)):
                if name in experts:
                    scores |= expert_scores(experts[name], tensors, at_experts(stream, name), plan.device)
                    continue
                info = infos[name]
                if not stream.shares_inputs():
                    norm = _norm(inputs, stream, matrix_shape(info)[1], plan.device)
                scores[name] = as_matrix(info, tensors[name]).to(plan.device, torch.float32).abs().mul_(norm)
            stream.unload(block)
            run.progress.advance()
            yield block, scores


def _with_inputs(plan: PruningPlan, block: int) -> dict[str, TensorInfo]:
    """The tensors to prune of a block whose inputs can be seen."""
    return {name: info for name, info in plan.pruned_infos(block).items() if info.role in ROLES_WITH_INPUTS}


def _norm(inputs: Sequence[torch.Tensor], stream: Stream, width: int, device: torch.device) -> torch.Tensor:
    statistics = InputStatistics(("sq_norm",), width, device).share(stream.ranks, stream.tokens_before)
    statistics.add_batches(inputs, None, stream.here())
    return statistics.combine().values()["sq_norm"].sqrt()


def _loss_after_wanda(run: Run[PruningPlan], table: Mapping[str, float]) -> float:
    """The loss on the calibration text of the model pruned by Wanda as `table` says; nothing is written."""
    plan = run.plan
    asked = dict.fromkeys(plan.pruned_names(), plan.pattern.sparsity)
    patterns = {name: Unstructured(value) for name, value in {**asked, **table}.items()}
    wanda = make_pipeline("wanda", None, reconstruct=False, options={})
    settings = Settings(wanda, patterns, run.request.seed, plan.device, run.calibration.windows.tokens)
    batches = run.batches()
    with Stream(plan.model, batches, ranks=plan.ranks) as stream:
        for block in range(len(plan.model.blocks)):
            tensors = stream.load(block)
            prune_block([BlockPruner(stream, _with_inputs(plan, block), tensors, settings, run.progress)], block)
            stream.unload(block)
        losses = by_tokens(window_losses(stream), batches)
    return sum(losses) / len(losses)


def _block_counts(plan: PruningPlan) -> dict[str, int]:
    """Weights to prune per block that has any, in order."""
    counts = {}
    for block in range(len(plan.model.blocks)):
        count = sum(info.entry.count for info in plan.pruned_infos(block).values())
        if count:
            counts[str(block)] = count
    return counts


def _for_tensors(plan: PruningPlan, by_block: Mapping[str, float]) -> dict[str, float]:
    return {name: value for block, value in by_block.items() for name in plan.pruned_names(int(block))}
