"""Chooses how much each tensor of the blocks gives, before any is pruned; one outside them gives what was asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from calibration.batch import Batch
from calibration.tokens import TokenSet
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
from prune_cli.engine.lockstep import SameInputs
from prune_cli.engine.open_model import pick_batch_size
from prune_cli.engine.stream import Stream
from prune_cli.model.orientation import as_matrix, matrix_shape
from prune_cli.progress import Progress
from prune_cli.request.allocation import Allocation
from prune_cli.request.pipeline import make_pipeline
from prune_cli.request.request import PruneRequest
from prune_cli.unstructured.plan import ROLES_WITH_INPUTS
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.unstructured.prune_block import BlockPruner
from prune_cli.unstructured.prune_experts import expert_scores
from prune_cli.unstructured.prune_linear import Settings


def allocate(request: PruneRequest, job: PruningPlan, calibration: TokenSet | None, progress: Progress) -> Allocation:
    """The table for every tensor to prune: its parameter-weighted mean is the asked sparsity."""
    asked = job.pattern.sparsity
    flat = dict.fromkeys(job.pruned_names(), asked)
    options = request.allocation_options()
    inside = [name for name in flat if job.decisions[name].info.block is not None]
    if job.allocation_file is not None:
        table, facts = job.allocation_file, {}
    elif request.allocate == "uniform" or not inside:
        table, facts = {}, {}
    elif request.allocate == "erk":
        infos = {name: job.decisions[name].info for name in inside}
        shapes = {name: matrix_shape(info) for name, info in infos.items()}
        table, facts = erk(shapes, asked, {name: info.entry.count for name, info in infos.items()}), {}
    elif request.allocate == "owl":
        table, facts = _owl(job, _batches(request, job, calibration), asked, options, progress)
    elif request.allocate == "atp":
        assert calibration is not None
        table, facts = _atp(request, job, calibration, asked, options, progress)
    else:
        table, facts = _global(request, job, calibration, inside, asked, progress)
    return Allocation(request.allocate, asdict(options), {**flat, **table}, facts)


def _owl(
    job: PruningPlan, batches: Sequence[Batch], asked: float, options: Any, progress: Progress
) -> tuple[dict[str, float], dict[str, Any]]:
    shares: dict[str, float] = {}
    progress.stage("Measuring outliers", len(job.model.blocks))
    for block, scores in _dense_scores(job, batches, progress):
        if scores:
            shares[str(block)] = outlier_share(list(scores.values()), options.outlier)
    by_block = owl(shares, _block_counts(job), asked, options.spread)
    return _for_tensors(job, by_block), {"outlier_shares": shares}


def _atp(
    request: PruneRequest, job: PruningPlan, calibration: TokenSet, asked: float, options: Any, progress: Progress
) -> tuple[dict[str, float], dict[str, Any]]:
    counts = _block_counts(job)
    if options.slope is not None:
        return _for_tensors(job, arithmetic(counts, asked, options.slope)), {}
    steepest = steepest_slope(len(counts), asked)
    slopes = [steepest * step / options.candidates for step in range(options.candidates)]
    losses = {}
    for at, slope in enumerate(slopes):
        progress.stage(f"Trying slope {at + 1} of {len(slopes)}", len(job.pruned_names()))
        table = _for_tensors(job, arithmetic(counts, asked, slope))
        losses[slope] = _loss_after_wanda(request, job, calibration, table, progress)
    best = min(losses, key=losses.__getitem__)
    facts = {"slope": best, "tried": [{"slope": slope, "calibration_loss": loss} for slope, loss in losses.items()]}
    return _for_tensors(job, arithmetic(counts, asked, best)), facts


def _global(
    request: PruneRequest,
    job: PruningPlan,
    calibration: TokenSet | None,
    inside: Sequence[str],
    asked: float,
    progress: Progress,
) -> tuple[dict[str, float], dict[str, Any]]:
    """One threshold on |W|, or where the method reads inputs on Wanda scores over their root mean square per tensor."""
    histogram = ScoreHistogram()
    progress.stage("Measuring scores", len(job.model.blocks))
    if job.pipeline.needs:
        for _, scores in _dense_scores(job, _batches(request, job, calibration), progress):
            for name, score in scores.items():
                histogram.add(name, score / score.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny))
    else:
        for name in inside:
            histogram.add(name, job.checkpoint.read(name).float().abs())
    return histogram.sparsities(asked), {}


def _dense_scores(
    job: PruningPlan, batches: Sequence[Batch], progress: Progress
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Block by block the Wanda scores (out, in) of its maps to prune, on the dense model's own inputs."""
    with Stream(job.model, batches) as stream:
        for block in range(len(job.model.blocks)):
            tensors = stream.load(block)
            names = _with_inputs(job, block)
            experts = experts_by_module({name: job.decisions[name].info for name in names})
            scores: dict[str, torch.Tensor] = {}
            same_inputs, norm = SameInputs(), torch.empty(0)
            for name, inputs in stream.pause_at(block, names):
                if name in experts:
                    scores |= expert_scores(experts[name], tensors, at_experts(stream, name), job.device)
                    continue
                info = job.decisions[name].info
                if not same_inputs.repeated(inputs):
                    norm = _norm(inputs, stream.here(), matrix_shape(info)[1], job.device)
                scores[name] = as_matrix(info, tensors[name]).to(job.device, torch.float32).abs().mul_(norm)
            stream.unload(block)
            progress.advance()
            yield block, scores


def _with_inputs(job: PruningPlan, block: int) -> list[str]:
    """The tensors to prune of a block whose inputs can be seen."""
    return [name for name in job.pruned_names(block) if job.decisions[name].info.role in ROLES_WITH_INPUTS]


def _norm(inputs: Sequence[torch.Tensor], batches: Sequence[Batch], width: int, device: torch.device) -> torch.Tensor:
    statistics = InputStatistics(("sq_norm",), width, device)
    statistics.add_batches(inputs, None, batches)
    return statistics.values()["sq_norm"].sqrt()


def _loss_after_wanda(
    request: PruneRequest, job: PruningPlan, calibration: TokenSet, table: Mapping[str, float], progress: Progress
) -> float:
    """The loss on the calibration text of the model pruned by Wanda as `table` says; nothing is written."""
    asked = dict.fromkeys(job.pruned_names(), job.pattern.sparsity)
    patterns = {name: Unstructured(value) for name, value in {**asked, **table}.items()}
    wanda = make_pipeline("wanda", None, reconstruct=False, options={})
    settings = Settings(wanda, patterns, request.seed, job.device)
    batches = _batches(request, job, calibration)
    with Stream(job.model, batches) as stream:
        for block in range(len(job.model.blocks)):
            names = _with_inputs(job, block)
            tensors = stream.load(block)
            BlockPruner(job, tensors, names, settings, calibration.windows.tokens, progress).run(stream, block)
            stream.unload(block)
        losses = by_tokens(window_losses(stream, batches), batches)
    return sum(losses) / len(losses)


def _batches(request: PruneRequest, job: PruningPlan, calibration: TokenSet | None) -> Sequence[Batch]:
    assert calibration is not None
    return calibration.windows.split(pick_batch_size(request.batch_size, job.device, calibration.ids.shape[1]))


def _block_counts(job: PruningPlan) -> dict[str, int]:
    """Weights to prune per block that has any, in order."""
    counts = {}
    for block in range(len(job.model.blocks)):
        count = sum(job.decisions[name].info.entry.count for name in job.pruned_names(block))
        if count:
            counts[str(block)] = count
    return counts


def _for_tensors(job: PruningPlan, by_block: Mapping[str, float]) -> dict[str, float]:
    return {name: value for block, value in by_block.items() for name in job.pruned_names(int(block))}
