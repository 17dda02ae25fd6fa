"""How many experts each mixture keeps, and where a keep list says which, that it can be so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from methods.structured.experts import Options, keep_count, spread
from prune_cli.errors import RequestError
from prune_cli.structured.moe.keep_list import check_one_length, read_keep_list
from prune_cli.structured.moe.mixtures import Mixture
from prune_cli.structured.prepare import PreparedStructure, asked_share, refuse_both


def asked_count(prepared: PreparedStructure, mixtures: Sequence[Mixture]) -> int:
    """How many experts each mixture keeps, or where they differ the mean; raises RequestError where that cannot be."""
    options: Options = prepared.options
    mixture = max(mixtures, key=Mixture.fewest)
    experts, groups = mixture.experts, mixture.groups
    refuse_both(prepared.request, "keep", options.keep)
    if options.keep_list is not None:
        keep, said = _count_listed(prepared, mixtures), f"-o keep_list={options.keep_list}"
    elif options.keep is not None:
        keep, said = options.keep, f"-o keep={options.keep}"
        if keep >= experts:
            raise RequestError(f"{said} removes none of the {experts} experts: keep fewer.")
        if keep % groups:
            raise RequestError(
                f"{said} is no multiple of {groups}: the router sends tokens to {groups} groups of experts, which must "
                "stay of one size."
            )
    else:
        share = asked_share(prepared.request, "expert")
        keep, said = keep_count(share, experts, groups) if experts > groups else 0, f"--sparsity {share:g}"
    check_enough(keep, mixture, said)
    return keep


def check_enough(keep: int, mixture: Mixture, said: str) -> None:
    """Raise RequestError where `mixture` cannot work with `keep` experts, for which the user `said` something."""
    if keep < mixture.fewest():
        where = f" in {mixture.groups} groups" if mixture.groups > 1 else ""
        raise RequestError(
            f"{said} leaves {keep} of {mixture.experts} experts{where}, but every token is sent to {mixture.top_k}, "
            f"for which at least {mixture.fewest()} must stay."
        )


def uneven_counts(values: Mapping[int, torch.Tensor], keep: int, mixtures: Sequence[Mixture]) -> dict[int, int]:
    """By block, for `values` of the experts of each: in all as many as `keep` of every mixture."""
    groups = mixtures[0].groups
    fewest = {mixture.block: mixture.fewest() for mixture in mixtures}
    return spread(values, keep * len(mixtures), fewest, groups)


def _count_listed(prepared: PreparedStructure, mixtures: Sequence[Mixture]) -> int:
    listed = listed_experts(prepared, mixtures)
    said = f"-o keep_list={prepared.options.keep_list}"
    check_one_length(listed, said)
    keep = len(listed[mixtures[0].block])
    if keep >= mixtures[0].experts:
        raise RequestError(f"{said} removes none of the {keep} experts: list fewer.")
    return keep


def listed_experts(prepared: PreparedStructure, mixtures: Sequence[Mixture]) -> dict[int, list[int]]:
    """What -o keep_list= says, each group of a router of one size. Raises RequestError."""
    options: Options = prepared.options
    if options.keep is not None or prepared.request.sparsity is not None:
        other = "-o keep=" if options.keep is not None else "--sparsity"
        raise RequestError(f"-o keep_list= names the experts, so {other} has nothing to say: leave one of them out.")
    listed = read_keep_list(options.keep_list or "", mixtures)
    for mixture in mixtures:
        size, experts = mixture.experts // mixture.groups, listed[mixture.block]
        counts = {sum(each // size == group for each in experts) for group in range(mixture.groups)}
        if len(counts) > 1:
            raise RequestError(
                f"-o keep_list={options.keep_list} leaves groups of {min(counts)} and {max(counts)} experts in layer "
                f"{mixture.block}, but the router sends tokens to {mixture.groups} groups, which must stay of one size."
            )
    return listed


def listed_scores(keep_list: str | None, mixtures: Sequence[Mixture]) -> dict[int, torch.Tensor]:
    """Scores by which the experts of -o keep_list= stay, the first of them the highest; none without it."""
    if keep_list is None:
        return {}
    listed = read_keep_list(keep_list, mixtures)
    values = {mixture.block: torch.zeros(mixture.experts, dtype=torch.float64) for mixture in mixtures}
    for block, experts in listed.items():
        values[block][experts] = torch.arange(len(experts), 0, -1, dtype=torch.float64)
    return values
