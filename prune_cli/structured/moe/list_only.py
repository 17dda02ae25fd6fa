"""`--keep-list-only`: which experts stay, for runtimes that read that; the checkpoint is left as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from methods.structured.experts import choose
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.engine.inputs import check_weights, inputs_before
from prune_cli.engine.memory import PeakMemory
from prune_cli.engine.perplexity import read_texts
from prune_cli.engine.run_context import Run
from prune_cli.progress import Progress
from prune_cli.request.request import PruneRequest, check_list_only
from prune_cli.structured.moe.choose import expert_scores
from prune_cli.structured.moe.counts import asked_count, check_enough, listed_experts, listed_scores, uneven_counts
from prune_cli.structured.moe.keep_list import check_to_write, write_keep_list
from prune_cli.structured.moe.mixtures import Mixture, find_mixtures
from prune_cli.structured.prepare import PreparedStructure, prepare_structured
from prune_cli.structured.statistics_file import check_statistics


@dataclass(frozen=True)
class ExpertList:
    """What was written: `counts` are how many of the `experts` of each layer stay."""

    file: str
    model: str
    experts: int
    counts: Mapping[int, int]
    kept: int
    warnings: Sequence[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


@torch.no_grad()
def list_experts(request: PruneRequest, progress: Progress) -> ExpertList:
    """Write the list of the experts that stay: -o save_keep_list=, or else OUT. Raises as `prune` does."""
    check_list_only(request)
    prepared = prepare_structured(request, writes=False)
    options = prepared.options
    given = options.save_keep_list or str(request.out)
    check_to_write(given, replace=request.overwrite, said="" if options.save_keep_list else given)
    check_statistics(request, "-o keep_list=, which measures nothing" if options.keep_list is not None else None)
    mixtures = find_mixtures(prepared.model)
    if options.keep_list is not None:
        values = listed_scores(options.keep_list, mixtures)
        counts, warnings = _listed_counts(prepared, mixtures), []
    else:
        keep = asked_count(prepared, mixtures)
        values, warnings = _measured(prepared, mixtures, progress)
        even = dict.fromkeys(values, keep)
        counts = uneven_counts(values, keep, mixtures) if request.allocate == "global" else even
    kept = {each.block: choose(values[each.block], counts[each.block], each.groups) for each in mixtures}
    write_keep_list(given, kept, values)
    return ExpertList(given, request.model, mixtures[0].experts, counts, sum(counts.values()), warnings)


def _listed_counts(prepared: PreparedStructure, mixtures: Sequence[Mixture]) -> dict[int, int]:
    listed = listed_experts(prepared, mixtures)
    for mixture in mixtures:
        check_enough(len(listed[mixture.block]), mixture, f"-o keep_list={prepared.options.keep_list}")
    return {block: len(experts) for block, experts in listed.items()}


def _measured(
    prepared: PreparedStructure, mixtures: Sequence[Mixture], progress: Progress
) -> tuple[dict[int, torch.Tensor], list[str]]:
    """Scores of all experts by block, and warnings; the folder of the run holds its journal and goes with it."""
    with TemporaryDirectory() as scratch, PeakMemory(prepared.device) as memory:
        texts = read_texts(prepared, progress)
        inputs = inputs_before(prepared, texts)
        with OutputFolder(Path(scratch) / "none", prepared.checkpoint, prepared.source.folder) as output:
            run = Run(prepared, texts, output, progress, memory, inputs)
            output.begin({}, resume=False)
            check_weights(run)
            return expert_scores(run, mixtures), run.warnings
