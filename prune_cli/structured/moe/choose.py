"""`--method experts`: which experts of every mixture go, and the model without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibration.tokens import TokenSet
from methods.structured.experts import Options, choose, keep_count, scores
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.engine.open_model import pick_batch_size
from prune_cli.engine.seeds import seed_of
from prune_cli.errors import RequestError
from prune_cli.model.architecture import model_on_meta, read_config
from prune_cli.packed.output import output_config
from prune_cli.progress import Progress
from prune_cli.report.types import BlockChange
from prune_cli.request.request import PruneRequest
from prune_cli.structured.check_rebuilt import rebuild
from prune_cli.structured.config import config_from
from prune_cli.structured.moe.expert_statistics import measure_experts
from prune_cli.structured.moe.mixtures import (
    Mixture,
    changed_shapes,
    config_with_experts,
    find_mixtures,
    without_experts,
)
from prune_cli.structured.plan import StructuredPlan
from prune_cli.structured.prepare import PreparedStructure, asked_share, refuse_both
from prune_cli.structured.statistics_file import Statistics, check_statistics, measured
from prune_cli.structured.stored_output import check_module_lists, keep_module_lists

# Plain attributes of mixtures and routers that count the experts.
_COUNTS = frozenset({"num_experts", "num_local_experts", "n_routed_experts", "num_router_classes", "out_features"})


@dataclass(frozen=True)
class Choice:
    """The experts that stay in each block with any, and the scores of all."""

    kept: Mapping[int, Sequence[int]]
    scores: Mapping[int, Sequence[float]]


def check(request: PruneRequest, job: PreparedStructure) -> None:
    """Raise RequestError before any work for a number of experts that cannot stay, or an architecture unknown here."""
    drawn = job.options.score == "random"
    check_statistics(request, "-o score=random, which measures nothing" if drawn else None)
    example(request, job)


def example(request: PruneRequest, job: PreparedStructure) -> StructuredPlan:
    """A change of the size that was asked for, which keeps the first experts; all are of one size."""
    mixtures = find_mixtures(job.model)
    values = torch.arange(mixtures[0].experts, 0, -1)
    keep = asked_count(request, job, mixtures)
    return _change(job, mixtures, Choice({each.block: choose(values, keep, each.groups) for each in mixtures}, {}))


def forward_passes(request: PruneRequest, job: PreparedStructure) -> float:
    """How many passes of the calibration text the choice costs."""
    return 0.0 if job.options.score == "random" else 1.0


def asked_count(request: PruneRequest, job: PreparedStructure, mixtures: Sequence[Mixture]) -> int:
    """How many experts each mixture keeps; raises RequestError where that is impossible."""
    options: Options = job.options
    mixture = max(mixtures, key=Mixture.fewest)
    experts, groups = mixture.experts, mixture.groups
    refuse_both(request, "keep", options.keep)
    if options.keep is not None:
        keep, said = options.keep, f"-o keep={options.keep}"
        if keep >= experts:
            raise RequestError(f"{said} removes none of the {experts} experts: keep fewer.")
        if keep % groups:
            raise RequestError(
                f"{said} is no multiple of {groups}: the router sends tokens to {groups} groups of experts, which must "
                "stay of one size."
            )
    else:
        share = asked_share(request, "expert")
        keep, said = keep_count(share, experts, groups) if experts > groups else 0, f"--sparsity {share:g}"
    if keep < mixture.fewest():
        where = f" in {groups} groups" if groups > 1 else ""
        raise RequestError(
            f"{said} leaves {keep} of {experts} experts{where}, but every token is sent to {mixture.top_k}, for which "
            f"at least {mixture.fewest()} must stay."
        )
    return keep


def decide(
    request: PruneRequest,
    job: PreparedStructure,
    calibration: TokenSet | None,
    output: OutputFolder,
    progress: Progress,
) -> StructuredPlan:
    """Choose the experts, by what was measured (once, also when the run is resumed)."""
    mixtures = find_mixtures(job.model)
    keep, score = asked_count(request, job, mixtures), job.options.score
    sums = _sums(request, job, mixtures, calibration, output, progress)
    values: dict[int, torch.Tensor] = {}
    for mixture in mixtures:
        found = {name: torch.tensor(each, dtype=torch.float64) for name, each in sums[mixture.block].items()}
        generator = torch.Generator().manual_seed(seed_of(mixture.module, request.seed))
        values[mixture.block] = scores(found, score, generator)
    kept = {mixture.block: choose(values[mixture.block], keep, mixture.groups) for mixture in mixtures}
    return _change(job, mixtures, Choice(kept, {block: each.tolist() for block, each in values.items()}))


def asked(request: PruneRequest, job: PreparedStructure) -> str:
    """What was asked for, in words."""
    mixtures = find_mixtures(job.model)
    keep, experts = asked_count(request, job, mixtures), mixtures[0].experts
    if job.options.keep is not None:
        return f"{keep} of the {experts} experts of every mixture stay"
    share = 100 * asked_share(request, "expert")
    return f"{share:g} % of the {experts} experts of every mixture, which leaves {keep} after rounding"


def _sums(
    request: PruneRequest,
    job: PreparedStructure,
    mixtures: Sequence[Mixture],
    calibration: TokenSet | None,
    output: OutputFolder,
    progress: Progress,
) -> dict[int, dict[str, list[float]]]:
    if job.options.score == "random":
        return {mixture.block: {"tokens": [0.0] * mixture.experts} for mixture in mixtures}

    def measure(known: Statistics) -> Statistics:
        if "experts" in known.facts:
            return known
        if "experts" in output.notes:
            return Statistics(facts={"experts": output.notes["experts"]})
        assert calibration is not None
        batches = calibration.windows.split(pick_batch_size(request.batch_size, job.device, calibration.ids.shape[1]))
        sums = measure_experts(job, mixtures, batches, progress)
        output.note("experts", sums)
        return Statistics(facts={"experts": sums})

    sums = measured(request, job, output, calibration, measure).facts["experts"]
    return {int(block): each for block, each in sums.items()}  # JSON has no numbers for keys


def _change(job: PreparedStructure, mixtures: Sequence[Mixture], choice: Choice) -> StructuredPlan:
    """Raises RequestError where the architecture's config cannot describe the model without the experts."""
    experts, keep = mixtures[0].experts, len(next(iter(choice.kept.values())))
    config = output_config(job.checkpoint, read_config(job.source.folder))
    config_with_experts(config, job.model.config, experts, keep)
    keep_module_lists(job, config, range(len(job.model.blocks)), choice.kept)
    new = config_from(config, job.model)
    smaller = model_on_meta(new, job.model.dtype, job.trust_remote_code)
    axes = changed_shapes(job.model, smaller, experts, keep)
    tensors, dropped, slices = without_experts(job.model, axes, choice.kept)
    blocks = range(len(job.model.blocks))
    change = StructuredPlan(
        config=config,
        tensors=tensors,
        dropped=dropped,
        blocks=blocks,
        units=(experts * len(mixtures), keep * len(mixtures)),
        told=[_told(job, block, experts, choice) for block in blocks],
        shapes={name: tuple(smaller.state_dict()[name].shape) for name in axes},
        narrowed=_COUNTS,
        slices=slices,
    )
    check_module_lists(job, change)
    rebuild(job.model, new, change, trust_remote_code=job.trust_remote_code)
    return change


def _told(job: PreparedStructure, block: int, experts: int, choice: Choice) -> BlockChange:
    kept = choice.kept.get(block)
    if kept is None:
        return BlockChange(block, block, "", "it has no experts", {})
    gone = [str(expert) for expert in range(experts) if expert not in kept]
    values: dict[str, Any] = {f"expert {at}": value for at, value in enumerate(choice.scores.get(block, ()))}
    score = job.options.score
    why = "drawn by lot" if score == "random" else f"the lowest {score} of its {experts} experts"
    return BlockChange(block, block, f"experts {', '.join(gone)}", why, values)
