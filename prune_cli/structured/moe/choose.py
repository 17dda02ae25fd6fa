"""`--method experts`: which experts of every mixture go, and the model without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from methods.structured.experts import choose, scores
from prune_cli.checkpoint.config_file import read_config
from prune_cli.checkpoint.layout import OutputTensor
from prune_cli.engine.run_context import Run
from prune_cli.engine.seeds import seed_of
from prune_cli.errors import RequestError
from prune_cli.model.architecture import model_on_meta
from prune_cli.model.moe import drop_unread
from prune_cli.packed.output import output_bytes, output_config
from prune_cli.preflight.models_and_texts import open_text
from prune_cli.report.types import BlockChange
from prune_cli.request.request import check_even
from prune_cli.structured.check_rebuilt import rebuild
from prune_cli.structured.config import config_from
from prune_cli.structured.cost import Cost, Pass, how_chosen, how_known, passes_of
from prune_cli.structured.extra_heads import (
    by_layer,
    count_no_heads,
    heads_to_drop,
    refused_by_runtimes,
    whole_heads,
)
from prune_cli.structured.moe.after import check_after, check_samples, cost_after, make_up
from prune_cli.structured.moe.compare_sources import compared_use
from prune_cli.structured.moe.counts import asked_count, listed_scores
from prune_cli.structured.moe.expert_statistics import MEASURING_EXPERTS, finite_sums, measure_experts
from prune_cli.structured.moe.head_statistics import HeadMixture, find_head_mixtures, gather_head
from prune_cli.structured.moe.keep_list import check_to_write, write_keep_list
from prune_cli.structured.moe.mixtures import (
    Mixture,
    changed_shapes,
    config_with_experts,
    find_mixtures,
    without_experts,
)
from prune_cli.structured.moe.tables import expert_tables
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure, asked_share
from prune_cli.structured.statistics_file import Statistics, check_statistics, measured
from prune_cli.structured.stored_output import check_module_lists, keep_module_lists

# Plain attributes of mixtures and routers that count the experts.
_COUNTS = frozenset(
    {
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "num_routed_experts",
        "moe_num_experts",
        "total_experts",
        "num_router_classes",
        "out_features",
    }
)


@dataclass(frozen=True)
class Choice:
    """The experts that stay in each block with any, and the scores of all; `heads` are those of extra heads."""

    kept: Mapping[int, Sequence[int]]
    scores: Mapping[int, Sequence[float]]
    heads: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertRemoval:
    """Whole experts go. Raises RequestError for a number that cannot stay, or an architecture unknown here."""

    prepared: PreparedStructure

    def __post_init__(self) -> None:
        request, options = self.prepared.request, self.prepared.options
        useless = "-o score=random, which measures nothing" if options.score == "random" else None
        useless = "-o keep_list=, which measures nothing" if options.keep_list is not None else useless
        check_statistics(request, useless)
        check_to_write(options.save_keep_list, replace=request.resume or request.overwrite)
        compared = request.compare_calibration
        check_even(request)
        if compared is not None:
            if useless is not None:
                what = useless.partition(",")[0]
                raise RequestError(f"--compare-calibration needs what {what} does not measure: leave it out.")
            open_text(compared)
        check_after(self.prepared, find_mixtures(self.prepared.model))
        self.example()

    def asked(self) -> str:
        mixtures = find_mixtures(self.prepared.model)
        keep, experts = asked_count(self.prepared, mixtures), mixtures[0].experts
        if self.prepared.options.keep_list is not None:
            return f"{keep} of the {experts} experts of every mixture stay, those in {self.prepared.options.keep_list}"
        if self.prepared.options.keep is not None:
            return f"{keep} of the {experts} experts kept in every mixture"
        share = 100 * asked_share(self.prepared.request, "expert")
        return f"{share:g} % of the {experts} experts of every mixture removed, which leaves {keep} after rounding"

    def example(self) -> StructuredPlan:
        """The first experts stay; all are of one size."""
        mixtures = find_mixtures(self.prepared.model)
        values = torch.arange(mixtures[0].experts, 0, -1)
        keep = asked_count(self.prepared, mixtures)
        kept = {each.block: choose(values, keep, each.groups) for each in mixtures}
        heads = {each.head: choose(values, keep, each.like.groups) for each in _heads(self.prepared, mixtures)}
        return _change(self.prepared, mixtures, Choice(kept, {}, heads))

    def cost(self, text: str) -> Cost:
        choice = (Pass(MEASURING_EXPERTS, 1.0),) if self.prepared.options.measures else ()
        known = how_known(self.prepared) if choice else ()
        fit, told = cost_after(self.prepared.options.after)
        return Cost(choice, fit, (*how_chosen(self.prepared, passes_of(choice), text), *known, *told))

    def bytes_at_most(self) -> int:
        return output_bytes(self.prepared.checkpoint)

    def decide(self, run: Run[PreparedStructure]) -> StructuredPlan:
        check_samples(run)
        prepared, mixtures = run.plan, find_mixtures(run.model)
        keep, score = asked_count(prepared, mixtures), prepared.options.score
        heads = _heads(prepared, mixtures)
        sums = _sums(run, mixtures, heads)

        def values(place: int | str, seed_name: str) -> torch.Tensor:
            return _scores(sums[place], score, seed_of(seed_name, run.request.seed))

        of_blocks = listed_scores(prepared.options.keep_list, mixtures)
        of_blocks = of_blocks or {mixture.block: values(mixture.block, mixture.module) for mixture in mixtures}
        kept = {mixture.block: choose(of_blocks[mixture.block], keep, mixture.groups) for mixture in mixtures}
        if prepared.options.save_keep_list is not None:
            write_keep_list(prepared.options.save_keep_list, kept, of_blocks)
        of_heads = {h.head: choose(values(h.head, h.head), keep, h.like.groups) for h in heads if h.head in sums}
        choice = Choice(kept, {block: each.tolist() for block, each in of_blocks.items()}, of_heads)
        compared = compared_use(run, mixtures, {each.block: sums[each.block] for each in mixtures}, kept)
        return replace(_change(prepared, mixtures, choice), compared=compared)

    def write(self, run: Run[PreparedStructure], change: StructuredPlan) -> StructuredPlan:
        """What stays is as it was, or makes up for what went."""
        return change if run.plan.options.after == "nothing" else make_up(run, change)


def _heads(prepared: PreparedStructure, mixtures: Sequence[Mixture]) -> list[HeadMixture]:
    return [] if prepared.request.drop_extra_heads else find_head_mixtures(prepared.model, mixtures)


def expert_scores(run: Run[PreparedStructure], mixtures: Sequence[Mixture]) -> dict[int, torch.Tensor]:
    """By block, (experts,): higher for experts to keep."""
    sums, score, seed = _sums(run, mixtures, ()), run.plan.options.score, run.request.seed
    return {each.block: _scores(sums[each.block], score, seed_of(each.module, seed)) for each in mixtures}


def _scores(sums: Mapping[str, Sequence[float]], score: str, seed: int) -> torch.Tensor:
    found = {name: torch.tensor(each, dtype=torch.float64) for name, each in sums.items()}
    return scores(found, score, torch.Generator().manual_seed(seed))


def _sums(
    run: Run[PreparedStructure], mixtures: Sequence[Mixture], heads: Sequence[HeadMixture]
) -> dict[int | str, dict[str, list[float]]]:
    """Of each block with experts, and of each extra head that could be run."""
    if not run.plan.options.measures:
        places = [mixture.block for mixture in mixtures] + [head.head for head in heads]
        return {place: {"tokens": [0.0] * mixtures[0].experts} for place in places}

    def measure(known: Statistics) -> Statistics:
        if "experts" in known.facts:
            return known
        if "experts" in run.output.notes:
            return Statistics(facts={"experts": run.output.notes["experts"]})
        sums = _measured(run, mixtures, heads)
        run.output.note("experts", sums)
        return Statistics(facts={"experts": sums})

    sums = measured(run, measure).facts["experts"]
    # JSON has no numbers for keys.
    return {int(place) if str(place).isdecimal() else place: each for place, each in sums.items()}


def _measured(
    run: Run[PreparedStructure], mixtures: Sequence[Mixture], heads: Sequence[HeadMixture]
) -> dict[int | str, dict[str, list[float]]]:
    """Heads are run behind the blocks on text alone: embeddings of images are none of the tokens'."""
    batches, states = run.batches(), []
    if any(batch.beside for batch in batches):
        heads = []
    at_end = (lambda stream: states.extend(stream.last_states())) if heads else None
    sums: dict[int | str, Any] = {**measure_experts(run.plan, mixtures, batches, run.progress, at_end)}
    for head in heads:
        sums[head.head] = finite_sums(head.head, gather_head(run.plan, head, states, batches, run.progress))
    return sums


def _change(prepared: PreparedStructure, mixtures: Sequence[Mixture], choice: Choice) -> StructuredPlan:
    """Raises RequestError where the architecture's config cannot describe the model without the experts."""
    experts, keep = mixtures[0].experts, len(next(iter(choice.kept.values())))
    config = output_config(prepared.checkpoint, read_config(prepared.source.folder))
    config_with_experts(config, prepared.model.config, experts, keep)
    everywhere = {**choice.kept, **choice.heads}
    keep_module_lists(prepared, config, range(len(prepared.model.blocks)), by_layer(prepared, everywhere))
    count_no_heads(prepared, config)
    new = config_from(config, prepared.model)
    smaller = model_on_meta(new, prepared.model.dtype, prepared.trust_remote_code)
    if prepared.model.without_unread:
        drop_unread(smaller)
    axes = changed_shapes(prepared.model, smaller, mixtures[0], keep)
    left_out = heads_to_drop(prepared)
    tensors, dropped, slices = without_experts(prepared.model, axes, mixtures[0], everywhere, left_out)
    tables = expert_tables(prepared.model, axes, everywhere, experts)
    tensors |= {name: OutputTensor(name, prepared.model.tensor_map[name].entry.shape) for name in tables}
    blocks = range(len(prepared.model.blocks))
    whole = [head for head in whole_heads(prepared, axes) if head not in choice.heads]
    change = StructuredPlan(
        config=config,
        tensors=tensors,
        dropped=dropped,
        blocks=blocks,
        units=(experts * len(mixtures), keep * len(mixtures)),
        told=[_told(prepared, block, experts, choice) for block in blocks],
        shapes={name: tuple(smaller.state_dict()[name].shape) for name in axes},
        narrowed=_COUNTS,
        slices=slices,
        notes=tuple(refused_by_runtimes(head, keep) for head in whole),
        tables=tables,
        misfits=tuple(whole),
        experts=choice.kept,
        heads={head: _of_head(experts, kept, known=bool(choice.scores)) for head, kept in choice.heads.items()},
    )
    check_module_lists(prepared, change)
    rebuild(prepared.model, new, change, trust_remote_code=prepared.trust_remote_code)
    return change


def _told(prepared: PreparedStructure, block: int, experts: int, choice: Choice) -> BlockChange:
    kept = choice.kept.get(block)
    if kept is None:
        return BlockChange(block, block, "", "it has no experts", {})
    values: dict[str, Any] = {f"expert {at}": value for at, value in enumerate(choice.scores.get(block, ()))}
    score = prepared.options.score
    if prepared.options.keep_list is not None:
        return BlockChange(block, block, _removed(experts, kept), "not in the keep list", {})
    why = "drawn by lot" if score == "random" else f"the lowest {score} of its {experts} experts"
    return BlockChange(block, block, _removed(experts, kept), why, values)


def _of_head(experts: int, kept: Sequence[int], *, known: bool) -> str:
    """Which experts a head loses; in an example only how many."""
    return (
        f"without its {_removed(experts, kept)}" if known else f"without {experts - len(kept)} of its {experts} experts"
    )


def _removed(experts: int, kept: Sequence[int]) -> str:
    return "experts " + ", ".join(str(expert) for expert in range(experts) if expert not in kept)
