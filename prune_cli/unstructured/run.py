"""The story of a run that makes weights sparse, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict

import torch

from calibration.tokens import TokenSet
from methods._pattern import NofM, Pattern, Unstructured
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.open_model import pick_batch_size
from prune_cli.engine.perplexity import perplexity, perplexity_before, read_texts
from prune_cli.engine.self_calibration import self_calibrated
from prune_cli.engine.stream import Stream
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.packed.output import output_layout
from prune_cli.progress import Progress
from prune_cli.report.files import report_files
from prune_cli.report.types import Report
from prune_cli.request.allocation import Allocation
from prune_cli.request.request import PruneRequest
from prune_cli.sparse.config import LOADER, loader
from prune_cli.sparse.reencode import decode_shards, encode_shards
from prune_cli.unstructured.allocate import allocate
from prune_cli.unstructured.build_report import assemble_report, fingerprint, of_sparse_files
from prune_cli.unstructured.prepare import PruningPlan, prepare
from prune_cli.unstructured.prune_block import BlockPruner, run_beside_dense
from prune_cli.unstructured.prune_linear import PrunedLinear, Settings, prune_linear


def prune_unstructured(request: PruneRequest, progress: Progress) -> Report:
    """The run of a method that makes weights sparse. Raises as `prune_cli.run.prune` does."""
    begun = time.monotonic()
    job = prepare(request)
    memory = PeakMemory(job.device)
    given, evaluation = read_texts(request, job, progress)
    calibration = _with_sampled(request, job, given, progress)
    with OutputFolder(request.out, job.checkpoint) as output:
        progress.stage(f"Copying {len(job.checkpoint.files)} file(s)", 1)
        output.begin(
            fingerprint(request, job, calibration, evaluation), output_layout(job.checkpoint), resume=request.resume
        )
        if request.format == "sparse":
            decode_shards(output.partial, output.layout.files)
        before = perplexity_before(request, job, evaluation, output, progress)
        allocation = _allocation(request, job, calibration, output, progress)
        settings = Settings(job.pipeline, _patterns(job, allocation), request.seed, job.device, job.checkpoint.rounded)
        progress.stage(f"Pruning with {job.pipeline}", len(job.pruned_names()))
        if calibration is None:
            _prune_without_text(job, settings, output, progress, memory)
        else:
            _prune_with_text(request, job, settings, calibration, output, progress, memory)
        after = perplexity(request, job, evaluation, output.checkpoint(), "Perplexity after", progress)
        output.copy_side_files()
        seconds = time.monotonic() - begun
        report = assemble_report(
            request, job, allocation, output, calibration, evaluation, before, after, memory, seconds
        )
        if request.format == "sparse":
            report = _encode(job, report, output, progress)
        beside = {LOADER: loader()} if request.self_contained else {}
        output.commit({**report_files(report, job.source.folder), **beside}, job.config)
    return report


def _with_sampled(
    request: PruneRequest, job: PruningPlan, given: TokenSet | None, progress: Progress
) -> TokenSet | None:
    """The calibration windows, and those that the dense model adds; the same ones when the run is resumed."""
    if given is None:
        return None
    batch_size = pick_batch_size(request.batch_size, job.device, given.ids.shape[1])
    return self_calibrated(given, request.self_calibration, job.model, batch_size, request.seed, progress)


def _encode(job: PruningPlan, report: Report, output: OutputFolder, progress: Progress) -> Report:
    """Make the files sparse, last of all; a run stopped here decodes them again when it is resumed."""
    progress.stage(f"Encoding {len(output.layout.files)} file(s)", len(report.tensors))
    output.release()
    nbytes = encode_shards(output.partial, output.layout.files, progress)
    return of_sparse_files(report, job, output, nbytes)


def _allocation(
    request: PruneRequest, job: PruningPlan, calibration: TokenSet | None, output: OutputFolder, progress: Progress
) -> Allocation:
    """Chosen once, also when the run is resumed."""
    if "allocation" in output.notes:
        return Allocation(**output.notes["allocation"])
    allocation = allocate(request, job, calibration, progress)
    output.note("allocation", asdict(allocation))
    return allocation


def _patterns(job: PruningPlan, allocation: Allocation) -> dict[str, Pattern]:
    if isinstance(job.pattern, NofM):
        return dict.fromkeys(job.pruned_names(), job.pattern)
    return {name: Unstructured(sparsity) for name, sparsity in allocation.sparsity.items()}


def _prune_without_text(
    job: PruningPlan, settings: Settings, output: OutputFolder, progress: Progress, memory: PeakMemory
) -> None:
    """No forward pass: a method that looks at weights alone, block by block, then what lies outside the blocks."""
    for group in range(len(job.model.blocks) + 1):
        names = job.pruned_names(group)
        if group not in output.done and names:
            begun = time.monotonic()
            pruned = {name: _prune_data_free(job, name, settings) for name in names}
            _write(job.model, output, group, pruned, [], begun)
            memory.look()
        progress.advance(len(names))
    output.wait()


def _prune_data_free(job: PruningPlan, name: str, settings: Settings) -> PrunedLinear:
    return prune_linear(job.decisions[name].info, job.checkpoint.read(name), settings, {}, None)


def _prune_with_text(
    request: PruneRequest,
    job: PruningPlan,
    settings: Settings,
    calibration: TokenSet,
    output: OutputFolder,
    progress: Progress,
    memory: PeakMemory,
) -> None:
    """One pass of the calibration batches, block by block; blocks done before are passed as they were left."""
    batches = calibration.windows.split(pick_batch_size(request.batch_size, job.device, calibration.ids.shape[1]))
    with ExitStack() as stack:
        stream = stack.enter_context(Stream(job.model, batches, ActivationOffload(output.partial)))
        streams = [stream]
        if request.target == "dense":
            streams.append(
                stack.enter_context(
                    Stream(job.with_checkpoint(job.checkpoint), batches, ActivationOffload(output.partial))
                )
            )
        for block in range(len(job.model.blocks)):
            if block in output.done:
                _pass_done_block(block, streams, output.checkpoint())
                progress.advance(len(job.pruned_names(block)))
            else:
                _prune_block(request, job, settings, calibration, block, streams, output, progress)
            memory.look()
            for each in streams:
                each.unload(block)
        _prune_outside_blocks(job, settings, calibration, stream, output, progress)
    output.wait()


def _pass_done_block(block: int, streams: Sequence[Stream], pruned: Checkpoint) -> None:
    """An earlier run pruned this block: the first stream sees it so, the one beside it the dense block."""
    for each, checkpoint in zip(streams, (pruned, None), strict=False):
        each.load(block, checkpoint)
        each.run_block(block)


def _prune_block(
    request: PruneRequest,
    job: PruningPlan,
    settings: Settings,
    calibration: TokenSet,
    block: int,
    streams: Sequence[Stream],
    output: OutputFolder,
    progress: Progress,
) -> None:
    begun = time.monotonic()
    tensors, *_ = [each.load(block) for each in streams]
    names = job.pruned_names(block)
    pruner = BlockPruner(job, tensors, names, settings, calibration.windows.tokens, progress)
    if request.target == "dense":
        run_beside_dense([pruner], [streams[0]], streams[1], block)
    elif request.calibrate_by == "block":
        pruner.run_twice(streams[0], block)
    else:
        pruner.run(streams[0], block)
    _write(job.model, output, block, pruner.pruned, pruner.unreached, begun)


def _prune_outside_blocks(
    job: PruningPlan,
    settings: Settings,
    calibration: TokenSet,
    stream: Stream,
    output: OutputFolder,
    progress: Progress,
) -> None:
    """What --include added beyond the blocks; the blocks were calibrated with these tensors still dense."""
    group = len(job.model.blocks)
    names = job.pruned_names(group)
    if names and group not in output.done:
        begun = time.monotonic()
        tensors = {name: job.checkpoint.read(name) for name in names}
        pruner = BlockPruner(job, tensors, names, settings, calibration.windows.tokens, progress)
        pruner.run_outside_blocks(stream)
        _write(job.model, output, group, pruner.pruned, pruner.unreached, begun)


def _write(
    model: StreamedModel,
    output: OutputFolder,
    group: int,
    pruned: Mapping[str, PrunedLinear],
    unreached: Sequence[str],
    begun: float,
) -> None:
    """Hand a group's tensors to the writer, a tied tensor that is stored twice to both its places."""
    tensors: dict[str, torch.Tensor] = {}
    for name, result in pruned.items():
        for info in (name, *model.tied_names(name)):
            tensors.setdefault(info, result.stored)
    record = {
        "seconds": time.monotonic() - begun,
        "output_errors": {name: result.output_error for name, result in pruned.items()},
        "notes": {name: list(result.notes) for name, result in pruned.items() if result.notes},
        "unreached": list(unreached),
    }
    output.write_block(group, model.checkpoint.as_stored(tensors), record)
