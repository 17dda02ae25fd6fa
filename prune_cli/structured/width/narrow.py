"""`--method width`: narrower MLPs and fewer heads in every block, chosen and made up for as the batches pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from methods.structured.width import Options, default_multiple, kept_units
from prune_cli.checkpoint.config_file import read_config
from prune_cli.checkpoint.layout import OutputTensor
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.run_context import Run
from prune_cli.engine.stream import Stream
from prune_cli.errors import RequestError
from prune_cli.model.architecture import model_on_meta
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.packed.output import output_bytes, output_config
from prune_cli.report.types import BlockChange
from prune_cli.structured.check_rebuilt import compare_shapes
from prune_cli.structured.config import config_from, text_config
from prune_cli.structured.cost import Cost, Pass, how_known
from prune_cli.structured.extra_heads import count_no_heads, too_wide
from prune_cli.structured.fit_block import BlockNarrower, NarrowedBlock, layers_and_biases
from prune_cli.structured.hidden_states import MEASURING_STATES
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure, asked_share
from prune_cli.structured.statistics_file import check_statistics
from prune_cli.structured.units import WORDS, CoupledGroup, GroupName
from prune_cli.structured.width.checkpoint_views import ScatteredCheckpoint
from prune_cli.structured.width.coupling import override_entry, unit_count
from prune_cli.structured.width.mlp_keys import find_groups, width_keys
from prune_cli.structured.width.nonuniform import angles_of_blocks, with_sizes
from prune_cli.structured.width.verify_coupling import verified_group, verified_groups

# Numbers of two bytes each.
_ALIGNED = 8


@dataclass(frozen=True)
class WidthPlan(StructuredPlan):
    """What becomes narrower, and by how much."""

    groups: Sequence[CoupledGroup] = ()


class WidthRemoval:
    """Channels and heads go. Raises RequestError where what carries them is not found and proven in this architecture.

    With -o uniform=false each block gets a size of its own: CFSP's coarse stage, by how far it turns the states.
    """

    def __init__(self, prepared: PreparedStructure) -> None:
        self.prepared = prepared
        self.groups = _groups(prepared)

    def asked(self) -> str:
        groups = {"mlp": "MLP channels", "heads": "attention heads", "both": "MLP channels and attention heads"}
        share = 100 * asked_share(self.prepared.request, "unit")
        return f"{share:g} % of the {groups[self.prepared.options.parts]} of every block removed"

    def example(self) -> StructuredPlan:
        """With -o uniform=false of the same size, spread evenly."""
        if self.prepared.options.uniform:
            return _plan(self.prepared, self.groups)
        return self._sized([1.0] * len(self.prepared.model.blocks))

    def cost(self, text: str) -> Cost:
        """The sizes are chosen in a pass of their own, all else as the blocks are narrowed."""
        prepared, options = self.prepared, self.prepared.options
        sizes, fit = (
            float(not options.uniform),
            float(prepared.method.needs_text(options)) * (1 + options.follows_dense),
        )
        how: list[str] = []
        if sizes:
            how.append(
                f"How many {prepared.method.unit} each block keeps costs one forward pass{text}; their sum is known "
                "before, so that the sizes told here change by no more than a few bytes of file headers."
            )
            how += how_known(prepared)
        if fit:
            how.append(
                f"Choosing those that go and fitting what is left costs about {fit:.1f} forward passes{text}, and "
                "statistics of the layers' inputs."
            )
        else:
            how.append("Those that go are chosen by the weights alone.")
        choice = (Pass(MEASURING_STATES, sizes),) if sizes else ()
        return Cost(choice, (Pass("Narrowing", fit, fits=float(bool(fit))),), tuple(how))

    def bytes_at_most(self) -> int:
        return output_bytes(self.prepared.checkpoint)

    def decide(self, run: Run[PreparedStructure]) -> StructuredPlan:
        if self.prepared.options.uniform:
            return _plan(self.prepared, self.groups)
        return self._sized(angles_of_blocks(run))

    def write(self, run: Run[PreparedStructure], change: StructuredPlan) -> StructuredPlan:
        """Pass the blocks in order, each narrowed as the batches pass it, and written."""
        assert isinstance(change, WidthPlan)
        groups, output, blocks = change.groups, run.output, range(len(run.model.blocks))
        run.progress.stage(f"Narrowing {len(blocks)} blocks", len(blocks))
        if run.texts.calibration is None:
            for block in blocks:
                if block not in output.done:
                    _narrow_data_free(run, groups, block)
                run.progress.advance()
        else:
            _narrow_with_text(run, groups)
        output.wait()
        return replace(change, told=[_told(run.plan, groups, block, output.done[block]) for block in blocks])

    def _sized(self, angles: Sequence[float]) -> WidthPlan:
        return _plan(self.prepared, [with_sizes(self.prepared, group, angles) for group in self.groups])


def _groups(prepared: PreparedStructure) -> list[CoupledGroup]:
    """Find what carries the units and prove it."""
    options: Options = prepared.options
    with_overrides = not options.uniform
    every_block = "-o uniform=true, where no block has to wait for the others (only the sizes of -o uniform=false do)"
    check_statistics(prepared.request, None if with_overrides else every_block)
    found: list[CoupledGroup] = []
    told: list[str] = []
    for key, units in width_keys(prepared).items() if options.parts in ("mlp", "both") else ():
        keep = _keep(prepared, "mlp", units)
        told.append(f"{units} {WORDS['mlp']}")
        if keep < units:
            choices = list(find_groups(prepared, key, units, keep))
            if with_overrides and any(group.name == "experts" for group in choices[0]):
                raise RequestError(
                    "-o uniform=false gives blocks sizes of their own, which experts cannot have: use -o uniform=true."
                )
            found += verified_groups(prepared, choices, with_overrides=with_overrides)
    if options.parts in ("heads", "both"):
        units = unit_count(prepared, "heads")
        keep = _keep(prepared, "heads", units)
        told.append(f"{units} {WORDS['heads']}")
        if keep < units:
            found.append(verified_group(prepared, "heads", keep, with_overrides=with_overrides))
    if not found:
        raise RequestError(
            f"--sparsity {asked_share(prepared.request, 'unit'):g} of {' and '.join(told)} a block rounds to none: ask "
            "for more" + (", or give a smaller -o multiple=." if options.parts != "heads" else ".")
        )
    _check_once(prepared, found)
    _check_biases(prepared, found)
    return found


def _check_once(prepared: PreparedStructure, groups: Sequence[CoupledGroup]) -> None:
    names: list[GroupName] = [group.name for group in groups]
    if len(names) > len(set(names)):
        raise RequestError(
            f"{type(prepared.model.model).__name__} has {' and '.join(WORDS[name] for name in names)} of several "
            "widths: this architecture cannot be narrowed so. Use -o parts=heads, --method experts or depth."
        )


def _check_biases(prepared: PreparedStructure, groups: Sequence[CoupledGroup]) -> None:
    modules = {prepared.model.tensor_map[name].module_name for group in groups for name in group.consumers.values()}
    biases = {f"{module}.bias" for module in modules} & {info.parameter for info in prepared.model.tensor_map.values()}
    if prepared.options.refit == "bias" and not biases:
        raise RequestError(
            f"-o refit=bias puts what is lost into biases, but the layers of {type(prepared.model.model).__name__} "
            f"that read the {' and '.join(WORDS[group.name] for group in groups)} have none: use -o refit=all."
        )


def _keep(prepared: PreparedStructure, group: GroupName, units: int) -> int:
    """How many of its `units` a block, or each of its experts, keeps."""
    multiple = (prepared.options.multiple or _default_multiple(prepared, units)) if group == "mlp" else 1
    if multiple > units:
        raise RequestError(
            f"-o multiple={multiple} is more than the {units} {WORDS[group]} of a block: give a smaller."
        )
    return kept_units(units, asked_share(prepared.request, "unit"), multiple)


def _default_multiple(prepared: PreparedStructure, units: int) -> int:
    """Torch multiplies all experts at once only where their rows are whole numbers of 16 bytes."""
    experts = any(info.role == "expert" for info in prepared.model.tensor_map.values())
    return max(default_multiple(units), _ALIGNED if experts and units % _ALIGNED == 0 and units > _ALIGNED else 1)


def _plan(prepared: PreparedStructure, groups: Sequence[CoupledGroup]) -> WidthPlan:
    """Names, shapes and config of the output; which units go is told block by block."""
    dropped = too_wide(prepared, {name for group in groups for name in group.slices})
    tensors = {name: OutputTensor(name) for name in prepared.model.tensor_map if name not in dropped}
    raw = output_config(prepared.checkpoint, read_config(prepared.source.folder))
    count_no_heads(prepared, raw)
    _, text = text_config(raw, prepared.model.config)
    shapes: dict[str, tuple[int, ...]] = {}
    for group in groups:
        if prepared.options.uniform:
            text.update(group.changes)
        for name, shape in group.shapes(prepared.model.tensor_map).items():
            tensors[name] = OutputTensor(name, shape)
            info = prepared.model.tensor_map[name]
            shapes[info.parameter or ""] = _shape_in_model(prepared, info, group, shape)
    if not prepared.options.uniform:
        raw["quantization_config"] = override_entry(prepared, groups)
    for name in _refitted(prepared, groups):
        tensors[name] = OutputTensor(name, tensors[name].shape or prepared.model.tensor_map[name].entry.shape)
    change = WidthPlan(
        config=raw,
        tensors=tensors,
        dropped=dropped,
        blocks=range(len(prepared.model.blocks)),
        units=_units(groups),
        told=(),
        shapes=shapes,
        groups=groups,
        shares={WORDS[group.name]: 1 - after / before for group in groups for before, after in [_counts(group)]},
    )
    if prepared.options.uniform:
        config = config_from(raw, prepared.model)
        compare_shapes(
            prepared.model, model_on_meta(config, prepared.dtype, prepared.trust_remote_code), change, config
        )
    return change


def _shape_in_model(
    prepared: PreparedStructure, info: TensorInfo, group: CoupledGroup, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Of the parameter that a narrowed tensor is, or is a part of."""
    part = info.expert
    if part is None or (part.index is None and not part.turned):
        return shape
    whole = list(prepared.model.shape_of(info.parameter or ""))
    axis = group.slices[info.entry.name].axis
    axis = 3 - axis if part.turned else axis + 1
    whole[axis] = whole[axis] // group.units * group.keep
    return tuple(whole)


def _units(groups: Sequence[CoupledGroup]) -> tuple[int, int]:
    counts = [_counts(group) for group in groups]
    return sum(before for before, _ in counts), sum(after for _, after in counts)


def _counts(group: CoupledGroup) -> tuple[int, int]:
    """Units of all blocks before and after."""
    kept = sum(group.kept_in(block) for block in group.consumers)
    return group.units * len(group.consumers) * group.experts, kept * group.experts


def _refitted(prepared: PreparedStructure, groups: Sequence[CoupledGroup]) -> list[str]:
    """Tensors that keep their shape and get new values: other linear layers of the blocks, biases of fitted layers."""
    options: Options = prepared.options
    if options.refit == "none":
        return []
    names: list[str] = []
    for block in {block for group in groups for block in group.consumers}:
        layers = [group.consumers[block] for group in groups if block in group.consumers and group.name != "experts"]
        if options.refit == "all" and options.follows_dense:
            layers = prepared.model.linear_layers(block)
        names += layers_and_biases(prepared.model, block, layers)
    return names


def _narrow_with_text(run: Run[PreparedStructure], groups: Sequence[CoupledGroup]) -> None:
    prepared, output, batches = run.plan, run.output, run.batches()
    options: Options = prepared.options
    with ExitStack() as stack:
        stream = stack.enter_context(
            Stream(prepared.model, batches, ActivationOffload(output.partial, prepared.budget), run.ranks)
        )
        dense = None
        if options.follows_dense:
            beside = prepared.with_checkpoint(prepared.checkpoint)
            dense = stack.enter_context(
                Stream(beside, batches, ActivationOffload(output.partial, prepared.budget), run.ranks)
            )
        for block in range(len(prepared.model.blocks)):
            begun = time.monotonic()
            done = block in output.done
            tensors = stream.load(block, _as_left(run, groups, block) if done else None)
            if dense is not None:
                dense.load(block)
            if not done and any(block in group.consumers for group in groups):
                result = BlockNarrower(prepared.model, block, tensors, groups, options).run(stream, dense)
                _hand_over(output, block, result, begun)
            else:
                for each in (stream, dense):
                    if each is not None:
                        each.run_block(block)
                if not done:
                    _hand_over(output, block, NarrowedBlock(), begun)
            for each in (stream, dense):
                if each is not None:
                    each.unload(block)
            run.progress.advance()


def _as_left(run: Run[PreparedStructure], groups: Sequence[CoupledGroup], block: int) -> Checkpoint:
    """A block that an earlier run has narrowed."""
    kept = run.output.done[block]["kept"]
    return ScatteredCheckpoint(
        run.plan.checkpoint,
        run.output.checkpoint(),
        groups,
        run.plan.model.tensor_map,
        {group: torch.tensor(units) for group, units in kept.items()},
    )


def _narrow_data_free(run: Run[PreparedStructure], groups: Sequence[CoupledGroup], block: int) -> None:
    """Scores of weights alone, and nothing fitted: no forward pass."""
    prepared, begun = run.plan, time.monotonic()
    result = NarrowedBlock()
    if any(block in group.consumers for group in groups):
        tensors = {name: prepared.checkpoint.read(name) for name in prepared.model.block_names(block)}
        result = BlockNarrower(prepared.model, block, tensors, groups, prepared.options).run_data_free()
        prepared.model.unload_block(block)
    _hand_over(run.output, block, result, begun)


def _hand_over(output: OutputFolder, block: int, result: NarrowedBlock, begun: float) -> None:
    record = {
        "seconds": time.monotonic() - begun,
        "output_errors": result.errors,
        "notes": result.notes,
        "kept": {group: kept.tolist() for group, kept in result.kept.items()},
    }
    output.write_block(block, result.tensors, record)


def _told(
    prepared: PreparedStructure, groups: Sequence[CoupledGroup], block: int, done: Mapping[str, object]
) -> BlockChange:
    options: Options = prepared.options
    groups = [group for group in groups if block in group.consumers]
    errors = done["output_errors"]
    assert isinstance(errors, dict)
    scores = {f"output_error_{group.name}": float(errors[group.consumers[block]]) for group in groups if errors}
    removed = ", ".join(
        f"{group.units - group.kept_in(block)} of {group.units} {WORDS[group.name]}" for group in groups
    )
    why = f"the lowest {options.score} scores" if options.score != "obs" else "the others make up for them best"
    return BlockChange(block, block, removed, why if groups else "has none", scores)
