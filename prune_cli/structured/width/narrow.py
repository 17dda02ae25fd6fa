"""`--method width`: narrower MLPs and fewer heads in every block, chosen and made up for as the batches pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from calibration.tokens import TokenSet
from methods.structured.width import Options, default_multiple, kept_units
from prune_cli.checkpoint.layout import OutputTensor
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.open_model import pick_batch_size
from prune_cli.engine.stream import Stream
from prune_cli.errors import RequestError
from prune_cli.model.architecture import model_on_meta, read_config
from prune_cli.packed.output import output_config
from prune_cli.progress import Progress
from prune_cli.report.types import BlockChange
from prune_cli.request.request import PruneRequest
from prune_cli.structured.check_rebuilt import compare_shapes
from prune_cli.structured.config import config_from, text_config
from prune_cli.structured.fit_block import BlockNarrower, NarrowedBlock, maps_and_biases
from prune_cli.structured.plan import UNUSED, StructuredPlan
from prune_cli.structured.prepare import PreparedStructure, asked_share
from prune_cli.structured.statistics_file import check_statistics
from prune_cli.structured.units import WORDS, CoupledGroup, GroupName
from prune_cli.structured.width.checkpoint_views import ScatteredCheckpoint
from prune_cli.structured.width.coupling import override_entry, unit_count
from prune_cli.structured.width.nonuniform import angles_of_blocks, with_sizes
from prune_cli.structured.width.verify_coupling import verified_group


@dataclass(frozen=True)
class WidthPlan:
    """What becomes narrower, and by how much; settled before any weight changes."""

    groups: Sequence[CoupledGroup]


def check(request: PruneRequest, job: PreparedStructure) -> WidthPlan:
    """Find what carries the units and prove it. Raises RequestError where this architecture cannot be narrowed."""
    options: Options = job.options
    names: tuple[GroupName, ...] = ("mlp", "heads") if options.parts == "both" else (options.parts,)
    sizes: dict[GroupName, tuple[int, int]] = {name: _keep(job, request, name) for name in names}
    with_overrides = not options.uniform
    every_block = "-o uniform=true, where no block has to wait for the others (only the sizes of -o uniform=false do)"
    check_statistics(request, None if with_overrides else every_block)
    found = [
        verified_group(job, name, keep, with_overrides=with_overrides)
        for name, (units, keep) in sizes.items()
        if keep < units
    ]
    if not found:
        told = " and ".join(f"{units} {WORDS[name]}" for name, (units, _) in sizes.items())
        raise RequestError(
            f"--sparsity {asked_share(request, 'unit'):g} of {told} a block rounds to none: ask for more"
            + (", or give a smaller -o multiple=." if "mlp" in sizes else ".")
        )
    _check_biases(job, found)
    return WidthPlan(found)


def _check_biases(job: PreparedStructure, groups: Sequence[CoupledGroup]) -> None:
    modules = {job.model.tensor_map[name].module_name for group in groups for name in group.consumers.values()}
    biases = {f"{module}.bias" for module in modules} & {info.parameter for info in job.model.tensor_map.values()}
    if job.options.refit == "bias" and not biases:
        raise RequestError(
            f"-o refit=bias puts what is lost into biases, but the maps of {type(job.model.model).__name__} that read "
            f"the {' and '.join(WORDS[group.name] for group in groups)} have none: use -o refit=all."
        )


def _keep(job: PreparedStructure, request: PruneRequest, group: GroupName) -> tuple[int, int]:
    """How many units a block has, and how many it keeps."""
    units = unit_count(job, group)
    multiple = (job.options.multiple or default_multiple(units)) if group == "mlp" else 1
    if multiple > units:
        raise RequestError(
            f"-o multiple={multiple} is more than the {units} {WORDS[group]} of a block: give a smaller."
        )
    return units, kept_units(units, asked_share(request, "unit"), multiple)


def asked(request: PruneRequest, job: PreparedStructure) -> str:
    """What the request says, for the report."""
    groups = {"mlp": "MLP channels", "heads": "attention heads", "both": "MLP channels and attention heads"}
    return f"{100 * asked_share(request, 'unit'):g} % of the {groups[job.options.parts]} of every block"


def spread(
    request: PruneRequest,
    job: PreparedStructure,
    plan: WidthPlan,
    calibration: TokenSet | None,
    output: OutputFolder,
    progress: Progress,
) -> WidthPlan:
    """With -o uniform=false, each block gets a size of its own: CFSP's coarse stage, by how far it turns the states."""
    if job.options.uniform:
        return plan
    assert calibration is not None
    angles = angles_of_blocks(request, job, calibration, output, progress)
    return WidthPlan([with_sizes(request, job, group, angles) for group in plan.groups])


def example(request: PruneRequest, job: PreparedStructure) -> StructuredPlan:
    """The change that was asked for; with -o uniform=false one of the same size, spread evenly."""
    plan = check(request, job)
    if not job.options.uniform:
        even = [1.0] * len(job.model.blocks)
        plan = WidthPlan([with_sizes(request, job, group, even) for group in plan.groups])
    return decide(job, plan)


def passes(job: PreparedStructure) -> tuple[float, float]:
    """Passes of the calibration text that the sizes cost, and the narrowing with its second stream."""
    options: Options = job.options
    return float(not options.uniform), float(job.method.needs_text(options)) * (1 + options.follows_dense)


def decide(job: PreparedStructure, plan: WidthPlan) -> StructuredPlan:
    """Names, shapes and config of the output; which units go is told block by block."""
    tensors = {name: OutputTensor(name) for name, info in job.model.tensor_map.items() if info.role != "unused"}
    dropped = {name: UNUSED for name, info in job.model.tensor_map.items() if info.role == "unused"}
    raw = output_config(job.checkpoint, read_config(job.source.folder))
    _, text = text_config(raw, job.model.config)
    shapes: dict[str, tuple[int, ...]] = {}
    for group in plan.groups:
        if job.options.uniform:
            text.update(group.changes)
        for name, shape in group.shapes(job.model.tensor_map).items():
            tensors[name] = OutputTensor(name, shape)
            shapes[job.model.tensor_map[name].parameter or ""] = shape
    if not job.options.uniform:
        raw["quantization_config"] = override_entry(job, plan.groups)
    for name in _refitted(job, plan):
        tensors[name] = OutputTensor(name, tensors[name].shape or job.model.tensor_map[name].entry.shape)
    change = StructuredPlan(
        config=raw,
        tensors=tensors,
        dropped=dropped,
        blocks=range(len(job.model.blocks)),
        units=_units(plan),
        told=(),
        shapes=shapes,
        shares={WORDS[group.name]: 1 - after / before for group in plan.groups for before, after in [_counts(group)]},
    )
    if job.options.uniform:
        config = config_from(raw, job.model)
        compare_shapes(job.model, model_on_meta(config, job.dtype, job.trust_remote_code), change, config)
    return change


def _units(plan: WidthPlan) -> tuple[int, int]:
    counts = [_counts(group) for group in plan.groups]
    return sum(before for before, _ in counts), sum(after for _, after in counts)


def _counts(group: CoupledGroup) -> tuple[int, int]:
    """Units of all blocks before and after."""
    return group.units * len(group.consumers), sum(group.kept_in(block) for block in group.consumers)


def _refitted(job: PreparedStructure, plan: WidthPlan) -> list[str]:
    """Tensors that keep their shape and get new values: other maps of the blocks, biases of fitted maps."""
    options: Options = job.options
    if options.refit == "none":
        return []
    names: list[str] = []
    for block in {block for group in plan.groups for block in group.consumers}:
        maps = [group.consumers[block] for group in plan.groups if block in group.consumers]
        if options.refit == "all" and options.follows_dense:
            maps = job.model.linear_maps(block)
        names += maps_and_biases(job.model, block, maps)
    return names


def write(
    request: PruneRequest,
    job: PreparedStructure,
    plan: WidthPlan,
    change: StructuredPlan,
    calibration: TokenSet | None,
    output: OutputFolder,
    progress: Progress,
    memory: PeakMemory,
) -> StructuredPlan:
    """Pass the blocks in order, each narrowed as the batches pass it and written; returns the change with its story."""
    blocks = range(len(job.model.blocks))
    progress.stage(f"Narrowing {len(blocks)} blocks", len(blocks))
    if calibration is None:
        for block in blocks:
            if block not in output.done:
                _narrow_data_free(job, plan, block, output)
            progress.advance()
    else:
        _narrow_with_text(request, job, plan, calibration, output, progress, memory)
    output.wait()
    return replace(change, told=[_told(job, plan, block, output.done[block]) for block in blocks])


def _narrow_with_text(
    request: PruneRequest,
    job: PreparedStructure,
    plan: WidthPlan,
    calibration: TokenSet,
    output: OutputFolder,
    progress: Progress,
    memory: PeakMemory,
) -> None:
    options: Options = job.options
    batches = calibration.windows.split(pick_batch_size(request.batch_size, job.device, calibration.ids.shape[1]))
    with ExitStack() as stack:
        stream = stack.enter_context(Stream(job.model, batches, ActivationOffload(output.partial)))
        dense = None
        if options.follows_dense:
            beside = job.with_checkpoint(job.checkpoint)
            dense = stack.enter_context(Stream(beside, batches, ActivationOffload(output.partial)))
        for block in range(len(job.model.blocks)):
            begun = time.monotonic()
            done = output.done.get(block)
            tensors = stream.load(
                block, None if done is None else _as_left(job, plan, block, done, output.checkpoint())
            )
            if dense is not None:
                dense.load(block)
            if done is None and any(block in group.consumers for group in plan.groups):
                result = BlockNarrower(job.model, block, tensors, plan.groups, options).run(stream, dense)
                _hand_over(output, block, result, begun)
            else:
                for each in (stream, dense):
                    if each is not None:
                        each.run_block(block)
                if done is None:
                    _hand_over(output, block, NarrowedBlock(), begun)
            memory.look()
            for each in (stream, dense):
                if each is not None:
                    each.unload(block)
            progress.advance()


def _as_left(
    job: PreparedStructure, plan: WidthPlan, block: int, done: Mapping[str, object], written: Checkpoint
) -> Checkpoint:
    kept = done["kept"]
    assert isinstance(kept, dict)
    return ScatteredCheckpoint(
        job.checkpoint, written, plan.groups, {group: torch.tensor(units) for group, units in kept.items()}
    )


def _narrow_data_free(job: PreparedStructure, plan: WidthPlan, block: int, output: OutputFolder) -> None:
    """Scores of weights alone, and nothing fitted: no forward pass."""
    begun = time.monotonic()
    result = NarrowedBlock()
    if any(block in group.consumers for group in plan.groups):
        tensors = {name: job.checkpoint.read(name) for name in job.model.block_names(block)}
        result = BlockNarrower(job.model, block, tensors, plan.groups, job.options).run_data_free()
        job.model.unload_block(block)
    _hand_over(output, block, result, begun)


def _hand_over(output: OutputFolder, block: int, result: NarrowedBlock, begun: float) -> None:
    record = {
        "seconds": time.monotonic() - begun,
        "output_errors": result.errors,
        "notes": result.notes,
        "kept": {group: kept.tolist() for group, kept in result.kept.items()},
    }
    output.write_block(block, result.tensors, record)


def _told(job: PreparedStructure, plan: WidthPlan, block: int, done: Mapping[str, object]) -> BlockChange:
    options: Options = job.options
    groups = [group for group in plan.groups if block in group.consumers]
    errors = done["output_errors"]
    assert isinstance(errors, dict)
    scores = {f"output_error_{group.name}": float(errors[group.consumers[block]]) for group in groups if errors}
    removed = ", ".join(
        f"{group.units - group.kept_in(block)} of {group.units} {WORDS[group.name]}" for group in groups
    )
    why = f"the lowest {options.score} scores" if options.score != "obs" else "the others make up for them best"
    return BlockChange(block, block, removed, why if groups else "has none", scores)
