"""The story of a run that makes weights sparse, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch

from methods._pattern import NofM, Pattern, Unstructured
from prune_cli.checkpoint.file_names import CARD
from prune_cli.checkpoint.shared_output import open_output
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.expected import copying_title, sizes_of
from prune_cli.engine.generate import continued
from prune_cli.engine.inputs import check_weights, inputs_before
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.memory_limit import within_memory
from prune_cli.engine.perplexity import perplexity_after, perplexity_before, read_texts
from prune_cli.engine.provenance import measured, processes_of
from prune_cli.engine.run_context import Run
from prune_cli.engine.self_calibration import self_calibrated
from prune_cli.engine.stream import Stream
from prune_cli.engine.texts import Texts
from prune_cli.engine.thin_calibration import thin_calibration
from prune_cli.errors import RequestError
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.packed.output import output_layout
from prune_cli.progress import Progress
from prune_cli.ranks.owners import owners
from prune_cli.ranks.ranks import ALONE, Ranks
from prune_cli.recovery.match_blocks import Samples
from prune_cli.report.files import report_files
from prune_cli.report.processes import Processes
from prune_cli.report.types import EvaluationReport, Report
from prune_cli.request.allocation import Allocation
from prune_cli.request.request import PruneRequest
from prune_cli.sparse.config import LOADER, loader
from prune_cli.sparse.reencode import decode_shards, encode_shards
from prune_cli.unstructured.allocate import allocate
from prune_cli.unstructured.allocate_by_outputs import OutputScores, measure_scores
from prune_cli.unstructured.build_report import assemble_report, fingerprint, of_sparse_files
from prune_cli.unstructured.match_block import MatchedBlock, match_block, matching_samples
from prune_cli.unstructured.memory import estimated_memory
from prune_cli.unstructured.prepare import PruningPlan, prepare
from prune_cli.unstructured.prune_block import BlockPruner, prune_block, prune_outside_blocks
from prune_cli.unstructured.prune_linear import PrunedLinear, Settings, prune_data_free
from prune_cli.unstructured.stages import encoding_title, pruning_title, stages_of, usual_pruning_pace


def prune_unstructured(request: PruneRequest, progress: Progress, ranks: Ranks = ALONE) -> Report:
    """The run of a method that makes weights sparse. Raises as `prune_cli.run.prune` does."""
    begun = time.monotonic()
    plan = prepare(request, ranks=ranks)
    _refuse_ranks(plan)
    with PeakMemory(plan.device) as memory:
        texts = read_texts(plan, progress)
        sizes = sizes_of(plan, texts)
        plan = within_memory(plan, estimated_memory(plan, sizes))
        progress.expect(stages_of(plan, sizes, usual_pruning_pace(plan)))
        inputs = inputs_before(plan, texts, allocation=plan.allocation_file)
        texts = _with_sampled(plan, texts, progress)
        with open_output(request.out, plan.checkpoint, plan.source.folder, ranks) as output:
            run = Run(plan, texts, output, progress, memory, inputs)
            progress.stage(copying_title(plan.checkpoint), 1)
            output.begin(fingerprint(plan, texts), output_layout(plan.checkpoint), resume=request.resume)
            check_weights(run)
            run.warn(*plan.warnings)
            if texts.calibration is not None:
                infos = plan.pruned_infos().values()
                tokens = texts.calibration.windows.tokens
                run.warn(*thin_calibration(tokens, infos, gram="gram" in plan.pipeline.needs))
            if request.format == "sparse":
                ranks.on_first(lambda: decode_shards(output.partial, output.layout.files))
            before = perplexity_before(run)
            scores = _scores(run)
            allocation = _allocation(run, scores)
            progress.stage(pruning_title(plan), len(plan.pruned_names()))
            if texts.calibration is None:
                _prune_without_text(run, _settings(run, allocation, scores))
            else:
                _prune_with_text(run, _settings(run, allocation, scores))
            evaluation = measured(texts, before, perplexity_after(run))
            processes = processes_of(run)
            return ranks.on_first(lambda: _end(run, allocation, evaluation, processes, begun))


def _end(
    run: Run[PruningPlan],
    allocation: Allocation,
    evaluation: EvaluationReport | None,
    processes: Processes | None,
    begun: float,
) -> Report:
    """Report and commit, once all weights are written."""
    plan, output, request = run.plan, run.output, run.request
    continuations = continued(run)
    output.copy_side_files()
    report = assemble_report(run, allocation, evaluation, time.monotonic() - begun)
    report = replace(report, continuations=continuations, processes=processes)
    if request.format == "sparse":
        report = _encode(run, report)
    beside = {LOADER: loader()} if request.self_contained else {}
    output.commit({**report_files(report, plan.source.folder / CARD), **beside}, plan.config)
    return report


def _refuse_ranks(plan: PruningPlan) -> None:
    """Raise RequestError for what one process must do."""
    if plan.ranks.several and plan.request.match_blocks:
        raise RequestError(
            "--match-blocks (part of --preset max) trains a block on all samples at once, which several processes "
            "cannot do yet: start one process, or add --no-match-blocks."
        )


def _with_sampled(plan: PruningPlan, texts: Texts, progress: Progress) -> Texts:
    """The calibration windows, and those that the dense model adds; the same ones when the run is resumed."""
    given = texts.calibration
    if given is None:
        return texts
    batching, request = plan.batching(given.windows), plan.request
    copies = plan.copies_of(given)
    sampled = plan.ranks.on_first(lambda: self_calibrated(given, copies, plan.model, batching, request.seed, progress))
    return replace(texts, calibration=sampled)


def _encode(run: Run[PruningPlan], report: Report) -> Report:
    """Make the files sparse, last of all; a run stopped here decodes them again when it is resumed."""
    output = run.output
    run.progress.stage(encoding_title(run.plan), len(report.tensors))
    output.release()
    nbytes = encode_shards(output.partial, output.layout.files, run.progress)
    return of_sparse_files(report, run.plan, output, nbytes)


def _scores(run: Run[PruningPlan]) -> OutputScores | None:
    """Where --allocate goes by them; a run that is resumed measures the same again."""
    if run.request.allocation != "sensitivity":
        return None
    scores = run.ranks.on_first(lambda: measure_scores(run.plan, run.batches(), run.progress))
    for block, reason in scores.failed.items():
        run.warn(f"Block {block} has no derivative, so that its tensors give the same share each: {reason}")
    return scores


def _allocation(run: Run[PruningPlan], scores: OutputScores | None) -> Allocation:
    """Chosen once, also when the run is resumed."""
    if "allocation" in run.output.notes:
        return Allocation(**run.output.notes["allocation"])
    chosen = allocate(run, scores)
    allocation = run.ranks.on_first(lambda: chosen)
    run.output.note("allocation", asdict(allocation))
    return allocation


def _settings(run: Run[PruningPlan], allocation: Allocation, scores: OutputScores | None) -> Settings:
    plan, calibration = run.plan, run.texts.calibration
    tokens = calibration.windows.tokens if calibration is not None else 0
    patterns = _patterns(plan, allocation)
    output, again = plan.checkpoint, run.request.match_blocks
    sensitivities = {} if scores is None else scores.outputs
    return Settings(plan.pipeline, patterns, run.request.seed, plan.device, tokens, output, sensitivities, again)


def _patterns(plan: PruningPlan, allocation: Allocation) -> dict[str, Pattern]:
    if isinstance(plan.pattern, NofM):
        return dict.fromkeys(plan.pruned_names(), plan.pattern)
    return {name: Unstructured(sparsity) for name, sparsity in allocation.sparsity.items()}


def _prune_without_text(run: Run[PruningPlan], settings: Settings) -> None:
    """No forward pass: a method that looks at weights alone, block by block, then what lies outside the blocks."""
    plan = run.plan
    for group in range(len(plan.model.blocks) + 1):
        infos = plan.pruned_infos(group)
        if group not in run.output.done and infos:
            begun = time.monotonic()
            _write(run, group, _prune_data_free(run, infos, settings), begun)
        run.progress.advance(len(infos))
    run.output.wait()


def _prune_data_free(
    run: Run[PruningPlan], infos: Mapping[str, TensorInfo], settings: Settings
) -> dict[str, PrunedLinear]:
    """Each by its owner, who sends it to the first rank."""
    read, ranks = run.plan.checkpoint.read, run.ranks
    dealt = dict(zip(infos, owners([info.entry.count for info in infos.values()], ranks.count), strict=True))
    own = {name: prune_data_free(infos[name], read(name), settings)[1] for name in infos if dealt[name] == ranks.rank}
    return {name: ranks.from_rank(owner, lambda name=name: own.pop(name)) for name, owner in dealt.items()}


def _prune_with_text(run: Run[PruningPlan], settings: Settings) -> None:
    """One pass of the calibration batches, block by block; blocks done before are passed as they were left."""
    plan, output = run.plan, run.output
    samples = matching_samples(run) if run.request.match_blocks else None
    with ExitStack() as stack:
        stream, *beside = streams = _streams(run, stack, samples)
        dense = beside[0] if run.request.target == "dense" else None
        for block in range(len(plan.model.blocks)):
            if block in output.done:
                _pass_done_block(run, streams, block)
            else:
                begun = time.monotonic()
                tensors, *_ = [each.load(block) for each in streams]
                pruner = BlockPruner(stream, plan.pruned_infos(block), tensors, settings, run.progress)
                prune_block([pruner], block, run.request.calibrate_by, dense)
                matched = None if samples is None else match_block(run, samples, block, (stream, beside[0]), pruner)
                _write(run, block, pruner.pruned, begun, pruner.unreached, matched)
            for each in streams:
                each.unload(block)
        _prune_outside_blocks(run, settings, stream)
    output.wait()


def _streams(run: Run[PruningPlan], stack: ExitStack, samples: Samples | None) -> list[Stream]:
    """The model's that is pruned and, where it is the target or blocks are matched to it, the dense one's."""
    plan, batches = run.plan, run.batches() if samples is None else samples.batches
    models = [plan.model]
    if run.request.target == "dense" or samples is not None:
        models.append(plan.with_checkpoint(plan.checkpoint))
    return [
        stack.enter_context(Stream(model, batches, ActivationOffload(run.output.partial, plan.budget), plan.ranks))
        for model in models
    ]


def _pass_done_block(run: Run[PruningPlan], streams: Sequence[Stream], block: int) -> None:
    """An earlier run pruned this block: the first stream sees it so, the one beside it the dense block."""
    for each, checkpoint in zip(streams, (run.output.checkpoint(), None), strict=False):
        each.load(block, checkpoint)
        each.run_block(block)
    run.progress.advance(len(run.plan.pruned_names(block)))


def _prune_outside_blocks(run: Run[PruningPlan], settings: Settings, stream: Stream) -> None:
    """What --include added beyond the blocks; the blocks were calibrated with these tensors still dense."""
    plan, group = run.plan, len(run.model.blocks)
    infos = plan.pruned_infos(group)
    if infos and group not in run.output.done:
        begun = time.monotonic()
        tensors = {name: plan.checkpoint.read(name) for name in infos}
        computed = {name: info for name, info in infos.items() if info.parameter is not None}
        pruner = BlockPruner(stream, computed, tensors, settings, run.progress)
        prune_outside_blocks(pruner)
        rest = [name for name in infos if name not in computed]
        heads = {name: prune_data_free(infos[name], tensors[name], settings)[1] for name in rest}
        run.progress.advance(len(heads))
        _write(run, group, {**pruner.pruned, **heads}, begun, pruner.unreached)


def _write(
    run: Run[PruningPlan],
    group: int,
    pruned: Mapping[str, PrunedLinear],
    begun: float,
    unreached: Sequence[str] = (),
    matched: MatchedBlock | None = None,
) -> None:
    """Hand a group's tensors to the writer, a tied tensor that is stored twice to both its places."""
    tensors: dict[str, torch.Tensor] = {} if matched is None else dict(matched.tensors)
    output = run.model.checkpoint
    for name, result in pruned.items():
        tensors.setdefault(output.stored_name(name), result.stored)
        for tied in run.model.tied_names(name):
            values = output.from_file(name, result.stored)
            tensors.setdefault(output.stored_name(tied), output.to_file(tied, values))
    record = {
        "seconds": time.monotonic() - begun,
        "output_errors": {name: result.output_error for name, result in pruned.items()},
        "notes": {name: list(result.notes) for name, result in pruned.items() if result.notes},
        "unreached": list(unreached),
        **({} if matched is None else {"matched": asdict(matched.result)}),
    }
    run.output.write_block(group, tensors, record)
