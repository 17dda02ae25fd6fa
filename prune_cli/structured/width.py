"""`--method width`: narrower MLPs and fewer heads in every block, chosen and made up for as the batches pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from calibration.tokens import TokenSet
from methods.structured.width import Options, default_multiple, kept_units
from prune_cli.architecture import model_on_meta, read_config
from prune_cli.checkpoint import Checkpoint
from prune_cli.errors import RequestError
from prune_cli.layout import Planned
from prune_cli.memory import PeakMemory
from prune_cli.output import OutputFolder
from prune_cli.packed.output import output_config
from prune_cli.parking import Parking
from prune_cli.prepare import pick_batch_size
from prune_cli.progress import Progress
from prune_cli.report import BlockChange
from prune_cli.request import PruneRequest
from prune_cli.stream import Stream
from prune_cli.structured.change import Change
from prune_cli.structured.config import config_from, text_config
from prune_cli.structured.coupling import WORDS, Part, PartName, sized_entry, unit_count
from prune_cli.structured.names import UNUSED
from prune_cli.structured.narrow import Widened
from prune_cli.structured.own_sizes import angles_of_blocks, with_sizes
from prune_cli.structured.prepare import StructuredJob
from prune_cli.structured.rebuild import compare_shapes
from prune_cli.structured.removal import proven_part
from prune_cli.structured.saved import check_statistics
from prune_cli.structured.share import asked_share
from prune_cli.structured.width_block import BlockNarrower, NarrowedBlock, maps_and_biases


@dataclass(frozen=True)
class WidthPlan:
    """What becomes narrower, and by how much; settled before any weight changes."""

    parts: Sequence[Part]


def check(request: PruneRequest, job: StructuredJob) -> WidthPlan:
    """Find what carries the units and prove it. Raises RequestError where this architecture cannot be narrowed."""
    options: Options = job.options
    names: tuple[PartName, ...] = ("mlp", "heads") if options.parts == "both" else (options.parts,)
    sizes: dict[PartName, tuple[int, int]] = {name: _keep(job, request, name) for name in names}
    sized = not options.uniform
    every_block = "-o uniform=true, where no block has to wait for the others (only the sizes of -o uniform=false do)"
    check_statistics(request, None if sized else every_block)
    found = [proven_part(job, name, keep, sized=sized) for name, (units, keep) in sizes.items() if keep < units]
    if not found:
        told = " and ".join(f"{units} {WORDS[name]}" for name, (units, _) in sizes.items())
        raise RequestError(
            f"--sparsity {asked_share(request, 'unit'):g} of {told} a block rounds to none: ask for more"
            + (", or give a smaller -o multiple=." if "mlp" in sizes else ".")
        )
    _check_biases(job, found)
    return WidthPlan(found)


def _check_biases(job: StructuredJob, parts: Sequence[Part]) -> None:
    modules = {job.model.places[name].module_name for part in parts for name in part.consumers.values()}
    biases = {f"{module}.bias" for module in modules} & {place.parameter for place in job.model.places.values()}
    if job.options.refit == "bias" and not biases:
        raise RequestError(
            f"-o refit=bias puts what is lost into biases, but the maps of {type(job.model.model).__name__} that read "
            f"the {' and '.join(WORDS[part.name] for part in parts)} have none: use -o refit=all."
        )


def _keep(job: StructuredJob, request: PruneRequest, part: PartName) -> tuple[int, int]:
    """How many units a block has, and how many it keeps."""
    units = unit_count(job, part)
    multiple = (job.options.multiple or default_multiple(units)) if part == "mlp" else 1
    if multiple > units:
        raise RequestError(f"-o multiple={multiple} is more than the {units} {WORDS[part]} of a block: give a smaller.")
    return units, kept_units(units, asked_share(request, "unit"), multiple)


def asked(request: PruneRequest, job: StructuredJob) -> str:
    """What the request says, for the report."""
    parts = {"mlp": "MLP channels", "heads": "attention heads", "both": "MLP channels and attention heads"}
    return f"{100 * asked_share(request, 'unit'):g} % of the {parts[job.options.parts]} of every block"


def spread(
    request: PruneRequest,
    job: StructuredJob,
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
    return WidthPlan([with_sizes(request, job, part, angles) for part in plan.parts])


def example(request: PruneRequest, job: StructuredJob) -> Change:
    """The change that was asked for; with -o uniform=false one of the same size, spread evenly."""
    plan = check(request, job)
    if not job.options.uniform:
        even = [1.0] * len(job.model.blocks)
        plan = WidthPlan([with_sizes(request, job, part, even) for part in plan.parts])
    return decide(job, plan)


def passes(job: StructuredJob) -> tuple[float, float]:
    """Passes of the calibration text that the sizes cost, and the narrowing with its second stream."""
    options: Options = job.options
    return float(not options.uniform), float(job.method.needs_text(options)) * (1 + options.follows_dense)


def decide(job: StructuredJob, plan: WidthPlan) -> Change:
    """Names, shapes and config of the output; which units go is told block by block."""
    tensors = {name: Planned(name) for name, place in job.model.places.items() if place.role != "unused"}
    dropped = {name: UNUSED for name, place in job.model.places.items() if place.role == "unused"}
    raw = output_config(job.checkpoint, read_config(job.source.folder))
    _, text = text_config(raw, job.model.config)
    shapes: dict[str, tuple[int, ...]] = {}
    for part in plan.parts:
        if job.options.uniform:
            text.update(part.changes)
        for name, shape in part.shapes(job.model.places).items():
            tensors[name] = Planned(name, shape)
            shapes[job.model.places[name].parameter or ""] = shape
    if not job.options.uniform:
        raw["quantization_config"] = sized_entry(job, plan.parts)
    for name in _refitted(job, plan):
        tensors[name] = Planned(name, tensors[name].shape or job.model.places[name].entry.shape)
    change = Change(
        config=raw,
        tensors=tensors,
        dropped=dropped,
        blocks=range(len(job.model.blocks)),
        units=_units(plan),
        told=(),
        shapes=shapes,
        shares={WORDS[part.name]: 1 - after / before for part in plan.parts for before, after in [_counts(part)]},
    )
    if job.options.uniform:
        config = config_from(raw, job.model)
        compare_shapes(job.model, model_on_meta(config, job.dtype, job.trust_remote_code), change, config)
    return change


def _units(plan: WidthPlan) -> tuple[int, int]:
    counts = [_counts(part) for part in plan.parts]
    return sum(before for before, _ in counts), sum(after for _, after in counts)


def _counts(part: Part) -> tuple[int, int]:
    """Units of all blocks before and after."""
    return part.units * len(part.consumers), sum(part.kept_in(block) for block in part.consumers)


def _refitted(job: StructuredJob, plan: WidthPlan) -> list[str]:
    """Tensors that keep their shape and get new values: other maps of the blocks, biases of fitted maps."""
    options: Options = job.options
    if options.refit == "none":
        return []
    names: list[str] = []
    for block in {block for part in plan.parts for block in part.consumers}:
        maps = [part.consumers[block] for part in plan.parts if block in part.consumers]
        if options.refit == "all" and options.follows_dense:
            maps = job.model.linear_maps(block)
        names += maps_and_biases(job.model, block, maps)
    return names


def write(
    request: PruneRequest,
    job: StructuredJob,
    plan: WidthPlan,
    change: Change,
    calibration: TokenSet | None,
    output: OutputFolder,
    progress: Progress,
    memory: PeakMemory,
) -> Change:
    """Pass the blocks in order, each narrowed as the batches pass it and written; returns the change with its story."""
    blocks = range(len(job.model.blocks))
    progress.stage(f"Narrowing {len(blocks)} blocks", len(blocks))
    if calibration is None:
        for block in blocks:
            if block not in output.done:
                _narrow_blind(job, plan, block, output)
            progress.advance()
    else:
        _narrow_with_text(request, job, plan, calibration, output, progress, memory)
    output.wait()
    return replace(change, told=[_told(job, plan, block, output.done[block]) for block in blocks])


def _narrow_with_text(
    request: PruneRequest,
    job: StructuredJob,
    plan: WidthPlan,
    calibration: TokenSet,
    output: OutputFolder,
    progress: Progress,
    memory: PeakMemory,
) -> None:
    options: Options = job.options
    batches = calibration.ids.split(pick_batch_size(request.batch_size, job.device, calibration.ids.shape[1]))
    with ExitStack() as stack:
        stream = stack.enter_context(Stream(job.model, batches, Parking(output.partial)))
        dense = None
        if options.follows_dense:
            beside = job.with_checkpoint(job.checkpoint)
            dense = stack.enter_context(Stream(beside, batches, Parking(output.partial)))
        for block in range(len(job.model.blocks)):
            begun = time.monotonic()
            done = output.done.get(block)
            tensors = stream.load(
                block, None if done is None else _as_left(job, plan, block, done, output.checkpoint())
            )
            if dense is not None:
                dense.load(block)
            if done is None and any(block in part.consumers for part in plan.parts):
                result = BlockNarrower(job.model, block, tensors, plan.parts, options).run(stream, dense)
                _hand_over(output, block, result, begun)
            else:
                for each in (stream, dense):
                    if each is not None:
                        each.through(block)
                if done is None:
                    _hand_over(output, block, NarrowedBlock(), begun)
            memory.look()
            for each in (stream, dense):
                if each is not None:
                    each.unload(block)
            progress.advance()


def _as_left(
    job: StructuredJob, plan: WidthPlan, block: int, done: Mapping[str, object], written: Checkpoint
) -> Checkpoint:
    kept = done["kept"]
    assert isinstance(kept, dict)
    return Widened(job.checkpoint, written, plan.parts, {part: torch.tensor(units) for part, units in kept.items()})


def _narrow_blind(job: StructuredJob, plan: WidthPlan, block: int, output: OutputFolder) -> None:
    """Scores of weights alone, and nothing fitted: no forward pass."""
    begun = time.monotonic()
    result = NarrowedBlock()
    if any(block in part.consumers for part in plan.parts):
        tensors = {name: job.checkpoint.read(name) for name in job.model.block_names(block)}
        result = BlockNarrower(job.model, block, tensors, plan.parts, job.options).run_blind()
        job.model.unload_block(block)
    _hand_over(output, block, result, begun)


def _hand_over(output: OutputFolder, block: int, result: NarrowedBlock, begun: float) -> None:
    record = {
        "seconds": time.monotonic() - begun,
        "output_errors": result.errors,
        "notes": result.notes,
        "kept": {part: kept.tolist() for part, kept in result.kept.items()},
    }
    output.write_block(block, result.tensors, record)


def _told(job: StructuredJob, plan: WidthPlan, block: int, done: Mapping[str, object]) -> BlockChange:
    options: Options = job.options
    parts = [part for part in plan.parts if block in part.consumers]
    errors = done["output_errors"]
    assert isinstance(errors, dict)
    scores = {f"output_error_{part.name}": float(errors[part.consumers[block]]) for part in parts if errors}
    removed = ", ".join(f"{part.units - part.kept_in(block)} of {part.units} {WORDS[part.name]}" for part in parts)
    why = f"the lowest {options.score} scores" if options.score != "obs" else "the others make up for them best"
    return BlockChange(block, block, removed, why if parts else "has none", scores)
