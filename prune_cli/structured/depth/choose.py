"""`--method depth`: which blocks go, and the model without them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from methods.structured.depth import FEW, Options, block_count, cheapest, cheapest_few, closest_run, lowest_influence
from prune_cli.engine.run_context import Run
from prune_cli.errors import RequestError
from prune_cli.packed.output import output_bytes
from prune_cli.report.types import BlockChange
from prune_cli.request.request import DEFAULT_SAMPLES
from prune_cli.structured.block_tables import check_no_block_tables
from prune_cli.structured.check_rebuilt import rebuild
from prune_cli.structured.config import config_from
from prune_cli.structured.cost import Cost, Pass, how_chosen, how_known, passes_of
from prune_cli.structured.depth.config import config_without_blocks
from prune_cli.structured.depth.greedy import Removals, refitted_loss
from prune_cli.structured.depth.refit import fitted_tensors, refit
from prune_cli.structured.depth.renumber import without_blocks
from prune_cli.structured.extra_heads import count_no_heads, heads_to_drop
from prune_cli.structured.hidden_states import MEASURING_STATES, known_states
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure, asked_share, refuse_both
from prune_cli.structured.statistics_file import Statistics, check_statistics, measured
from prune_cli.structured.stored_output import check_module_lists, keep_module_lists

# Fits need more text than losses: so many times the windows.
_FIT_ON = 4
_TRYING, _TRYING_REFITS = "Trying to remove each block", "Trying refits"
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class Choice:
    """The blocks to remove, why each goes or stays, and its scores."""

    removed: tuple[int, ...]
    why: Mapping[int, str]
    scores: Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class DepthRemoval:
    """Whole blocks go. Raises RequestError for those that do not exist, or cannot be left out of this architecture."""

    prepared: PreparedStructure

    def __post_init__(self) -> None:
        prepared, options = self.prepared, self.prepared.options
        named = options.which is not None
        check_statistics(prepared.request, "-o which=, which measures nothing" if named else None)
        if options.fits and not options.alpha:
            raise RequestError(
                "-o alpha=0 follows the dense model not at all, so nothing is fitted: use -o refit=none."
            )
        check_no_block_tables(prepared.model)
        removed = named_blocks(prepared)
        change_without(prepared, removed if removed is not None else [len(prepared.model.blocks) - 1])

    def asked(self) -> str:
        prepared = self.prepared
        options, blocks = prepared.options, len(prepared.model.blocks)
        if options.which is not None:
            return f"the blocks {options.which} removed"
        count = asked_count(prepared)
        if options.remove is not None:
            return f"{count} of the {blocks} blocks removed"
        share = 100 * asked_share(prepared.request, "block")
        return f"{share:g} % of the {blocks} blocks removed, which is {count} after rounding"

    def example(self) -> StructuredPlan:
        """Where the blocks are still to be chosen, the last ones go."""
        named, blocks = named_blocks(self.prepared), len(self.prepared.model.blocks)
        return change_without(self.prepared, named or list(range(blocks - asked_count(self.prepared), blocks)))

    def cost(self, text: str) -> Cost:
        prepared, choice = self.prepared, _passes_of_choice(self.prepared)
        how = how_chosen(prepared, passes_of(choice), text)
        if choice and _blocks_differ(prepared):
            how += ("The sizes are those without the last blocks; others are of another size.",)
        how += how_known(prepared) if choice else ()
        if not prepared.options.fits:
            return Cost(choice, (), how)
        # Both streams pass, in multiplications.
        named, blocks = named_blocks(prepared), len(prepared.model.blocks)
        fit = 2 - (asked_count(prepared) if named is None else len(named)) / blocks
        refit = f"Refitting what is left costs about {fit:.1f} forward passes, and Gram matrices of the layers' inputs."
        return Cost(choice, (Pass("Refitting", fit, fits=fit - 1),), (*how, refit))

    def bytes_at_most(self) -> int:
        """The smallest blocks may be those that go."""
        checkpoint, model, named = self.prepared.checkpoint, self.prepared.model, named_blocks(self.prepared)
        sizes = [sum(checkpoint.entries[n].nbytes for n in model.block_names(b)) for b in range(len(model.blocks))]
        removed = sorted(sizes)[: asked_count(self.prepared)] if named is None else [sizes[block] for block in named]
        return output_bytes(checkpoint) - sum(removed)

    def decide(self, run: Run[PreparedStructure]) -> StructuredPlan:
        named = named_blocks(run.plan)
        if named is not None:
            choice = Choice(tuple(named), dict.fromkeys(named, "named by -o which="), {})
        else:
            choice = _choose(run)
        return change_without(run.plan, choice.removed, choice)

    def write(self, run: Run[PreparedStructure], change: StructuredPlan) -> StructuredPlan:
        if run.plan.options.fits and run.texts.calibration is not None:
            return refit(run, change)
        return change


def named_blocks(prepared: PreparedStructure) -> list[int] | None:
    """The blocks of -o which=, None where they are to be chosen."""
    options, blocks = prepared.options, len(prepared.model.blocks)
    if options.which is None:
        asked_count(prepared)
        return None
    if options.remove is not None or prepared.request.sparsity is not None:
        other = "-o remove=" if options.remove is not None else "--sparsity"
        raise RequestError(f"-o which= names the blocks, so {other} has nothing to say: leave one of them out.")
    chosen: set[int] = set()
    for part in options.which.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise RequestError(f"-o which={options.which} is no list of blocks: write it as 20-27 or 3,5,7-9.")
        if last >= blocks:
            raise RequestError(
                f"-o which={options.which} names block {last}, but the model has {blocks}, counted from 0 to "
                f"{blocks - 1}."
            )
        chosen.update(range(first, last + 1))
    if len(chosen) == blocks:
        raise RequestError(f"-o which={options.which} names all {blocks} blocks: at least one must stay.")
    return sorted(chosen)


def asked_count(prepared: PreparedStructure) -> int:
    """How many blocks go. Raises RequestError where none would stay."""
    options, blocks = prepared.options, len(prepared.model.blocks)
    refuse_both(prepared.request, "remove", options.remove)
    if options.remove is None:
        share = asked_share(prepared.request, "block")
        if blocks == 1:
            raise RequestError("The model has a single block, which must stay: use another method.")
        return block_count(share, blocks)
    if options.remove >= blocks:
        raise RequestError(f"-o remove={options.remove}, but the model has {blocks} blocks: at least one must stay.")
    return options.remove


def _passes_of_choice(prepared: PreparedStructure) -> tuple[Pass, ...]:
    """Of the calibration text, in multiplications."""
    options, blocks = prepared.options, len(prepared.model.blocks)
    if options.which is not None:
        return ()
    if options.score != "greedy":
        return (Pass(MEASURING_STATES, 1.0),)
    samples = prepared.request.samples or DEFAULT_SAMPLES
    share, fitted_on = (min(times * options.windows, samples) / samples for times in (1, _FIT_ON))
    found: list[Pass] = []
    for left in range(blocks, blocks - asked_count(prepared), -1):
        # Each of those left runs what lies behind its own block, half of the rest on average.
        found.append(Pass(_TRYING, share * left / 2, heads=share * left, states=share * left))
        if options.fits:
            few = min(FEW, left)
            found.append(Pass(_TRYING_REFITS, 2 * fitted_on * few, fitted_on * few, few / 2, fitted_on))
    return tuple(found)


def _blocks_differ(prepared: PreparedStructure) -> bool:
    kinds = {
        tuple(prepared.checkpoint.entries[name].nbytes for name in prepared.model.block_names(block))
        for block in range(len(prepared.model.blocks))
    }
    return len(kinds) > 1


def change_without(prepared: PreparedStructure, removed: Sequence[int], choice: Choice | None = None) -> StructuredPlan:
    """Raises RequestError where the architecture's config cannot describe the model without `removed`."""
    blocks = len(prepared.model.blocks)
    kept = [block for block in range(blocks) if block not in removed]
    config, taken_out = config_without_blocks(
        prepared.source, prepared.model, kept, drops_heads=prepared.request.drop_extra_heads
    )
    keep_module_lists(prepared, config, kept)
    count_no_heads(prepared, config)
    tensors, dropped = without_blocks(prepared.model, kept, heads_to_drop(prepared))
    if prepared.options.fits:
        tensors |= fitted_tensors(prepared, tensors, removed)
    new = {block: number for number, block in enumerate(kept)}
    choice = choice or Choice(tuple(removed), {}, {})
    told = [
        BlockChange(
            block=block,
            new_block=new.get(block),
            removed="" if block in new else "the whole block",
            why=choice.why.get(block, ""),
            scores=choice.scores.get(block, {}),
        )
        for block in range(blocks)
    ]
    notes = tuple(_taken_out(key) for key in taken_out)
    change = StructuredPlan(config, tensors, dropped, kept, (blocks, len(kept)), told, notes=notes)
    check_module_lists(prepared, change)
    rebuild(prepared.model, config_from(config, prepared.model), change, trust_remote_code=prepared.trust_remote_code)
    return change


def _taken_out(key: str) -> str:
    return (
        f"config.json has lost {key}, a rule on the numbers of blocks that does not hold for those that are left; its "
        "lists say what each block is. A runtime that reads nothing but the rule cannot load the output."
    )


def _choose(run: Run[PreparedStructure]) -> Choice:
    prepared = run.plan
    count, score = asked_count(prepared), prepared.options.score

    def measure(known: Statistics) -> Statistics:
        return _greedy(run, count, known) if score == "greedy" else known_states(run, known)

    statistics = measured(run, measure)
    if score == "greedy":
        return _by_loss(statistics.facts[_greedy_key(prepared)][:count])
    if score == "influence":
        return _by_influence(statistics.tensors["influence"], count)
    return _by_angle(statistics.tensors["distances"], count)


def _by_influence(influence: torch.Tensor, count: int) -> Choice:
    order = torch.argsort(influence, stable=True).tolist()
    ranks = {block: rank + 1 for rank, block in enumerate(order)}
    return Choice(
        tuple(lowest_influence(influence, count)),
        {block: f"block influence {influence[block]:.5f}, number {ranks[block]} from below" for block in ranks},
        {block: {"influence": float(influence[block])} for block in ranks},
    )


def _by_angle(distances: torch.Tensor, count: int) -> Choice:
    run = closest_run(distances, count)
    ends = torch.diagonal(distances, count).tolist()
    why = f"in the run of {count} whose ends have the smallest angular distance, {ends[run[0]]:.5f}"
    return Choice(
        tuple(run),
        dict.fromkeys(run, why),
        {first: {"angular_distance_of_the_run_from_here": distance} for first, distance in enumerate(ends)},
    )


def _greedy(run: Run[PreparedStructure], count: int, known: Statistics) -> Statistics:
    """The first steps of a longer run are the steps of a shorter one, so known ones are taken over."""
    prepared, output, progress = run.plan, run.output, run.progress
    blocks, windows = len(prepared.model.blocks), prepared.options.windows
    steps: list[dict[str, Any]] = list(known.facts.get(_greedy_key(prepared), []))
    steps = max(steps, output.notes.get("greedy", []), key=len)
    removals = Removals(prepared, run.batches(run.calibration.windows[:windows]), progress)
    while len(steps) < count:
        removed = [step["block"] for step in steps]
        # In the first step also the model as it is: the last block's own lane would compute most of it anyway.
        candidates = [block for block in range(blocks + (not steps)) if block not in removed]
        progress.stage(f"{_TRYING}, {len(steps) + 1} of {count}", blocks * removals.passes(len(candidates)))
        losses = removals.losses(removed, candidates)
        before = steps[-1]["loss"] if steps else losses.pop(blocks)
        refitted = _refitted(run, removed, losses)
        best = cheapest(refitted or losses)
        step = {"block": best, "loss": losses[best], "loss_before": before, "losses": list(losses.items())}
        steps = [*steps, {**step, "refitted": list(refitted.items())}]
        output.note("greedy", steps)
    return Statistics({}, {_greedy_key(prepared): steps})


def _greedy_key(prepared: PreparedStructure) -> str:
    """Of the steps among the facts of a file of statistics."""
    options: Options = prepared.options
    fits = f", refitted with alpha {options.alpha:g} and damping {options.damping:g}" if options.fits else ""
    return f"greedy on {options.windows} windows{fits}"


def _refitted(run: Run[PreparedStructure], removed: Sequence[int], losses: Mapping[int, float]) -> dict[int, float]:
    """The losses after the refit without `removed` and each of the few that are cheapest without it."""
    options: Options = run.plan.options
    tried = cheapest_few(losses)
    if not options.fits or len(tried) == 1:
        return {}
    batches = run.batches(run.calibration.windows[: _FIT_ON * options.windows])
    run.progress.stage(f"{_TRYING_REFITS}, each without one of {len(tried)} blocks", len(run.model.blocks) * len(tried))
    return {block: refitted_loss(run.plan, {*removed, block}, batches, run.progress) for block in tried}


def _least(step: Mapping[str, Any]) -> str:
    refitted = dict(step["refitted"])
    if not refitted:
        return "the least of all"
    return f"{refitted[step['block']]:.4f} when what is left is fitted, the least of the {len(refitted)} cheapest"


def _by_loss(steps: Sequence[Mapping[str, Any]]) -> Choice:
    why = {
        step["block"]: f"removed as number {number + 1}: the calibration loss went from {step['loss_before']:.4f} to "
        f"{step['loss']:.4f} nats, {_least(step)}"
        for number, step in enumerate(steps)
    }
    scores: dict[int, dict[str, float]] = {}
    for step in steps:
        for block, loss in step["losses"]:
            scores[block] = {"loss_without_it": loss, "loss_before": step["loss_before"]}
        for block, loss in step["refitted"]:
            scores[block]["loss_without_it_refitted"] = loss
    return Choice(tuple(sorted(why)), why, scores)
