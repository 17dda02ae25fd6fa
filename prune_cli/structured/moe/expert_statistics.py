"""One pass of the dense model: what every expert makes of the tokens that are sent to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from calibration.batch import Batch
from calibration.statistics import sum_dtype
from methods.structured.experts import SUMS, expert_sums
from prune_cli.engine.expert_inputs import AtExperts, at_experts
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError
from prune_cli.model.moe import outputs_of
from prune_cli.progress import Progress
from prune_cli.structured.moe.mixtures import Mixture

MEASURING_EXPERTS = "Measuring the experts"

AtEnd = Callable[[Stream], None]


@dataclass
class ExpertSums:
    """Of one mixture, by the names of `methods.structured.experts.SUMS`, (experts,) float64 on the host.

    An expert that no token was sent to has zeros.
    """

    by_name: dict[str, torch.Tensor]

    @classmethod
    def of(cls, experts: int) -> ExpertSums:
        """Of no token yet."""
        return cls({name: torch.zeros(experts, dtype=torch.float64) for name in SUMS})

    def add(self, expert: int, part: Sequence[float]) -> None:
        """Take in one batch's part for one expert, as `expert_sums` gives it."""
        for name, value in zip(SUMS, part, strict=True):
            self.by_name[name][expert] += value

    def merge(self, other: ExpertSums) -> None:
        """Take in those of later batches: up to rounding, as if all had been summed here."""
        for name, values in self.by_name.items():
            values += other.by_name[name]


def measure_experts(
    opened: OpenModel,
    mixtures: Sequence[Mixture],
    batches: Sequence[Batch],
    progress: Progress,
    at_end: AtEnd | None = None,
) -> dict[int, dict[str, list[float]]]:
    """For every block with experts the sums of `methods.structured.experts.SUMS`, one entry an expert.

    `at_end` is called when all batches have passed the blocks. Raises PruneError where outputs are not finite.
    """
    sums = gather_experts(opened, mixtures, batches, progress, at_end)
    return {block: finite_sums(f"block {block}", found) for block, found in sums.items()}


def finite_sums(where: str, sums: ExpertSums) -> dict[str, list[float]]:
    """As JSON has them. Raises PruneError where outputs are not finite."""
    if not torch.isfinite(torch.stack(list(sums.by_name.values())).float()).all():
        raise PruneError(
            f"The outputs of the experts of {where} are not finite: the forward pass overflows; try --dtype float32."
        )
    return {name: values.tolist() for name, values in sums.by_name.items()}


def gather_experts(
    opened: OpenModel,
    mixtures: Sequence[Mixture],
    batches: Sequence[Batch],
    progress: Progress,
    at_end: AtEnd | None = None,
) -> dict[int, ExpertSums]:
    """The sums behind `measure_experts` over `batches`, which may be a part of them; one entry a block with experts."""
    by_block = {mixture.block: mixture for mixture in mixtures}
    sums: dict[int, ExpertSums] = {}
    progress.stage(MEASURING_EXPERTS, len(opened.model.blocks))
    with Stream(opened.model, batches, ranks=opened.ranks) as stream:
        for block in range(len(opened.model.blocks)):
            stream.load(block)
            names = [by_block[block].tensor] if block in by_block else []
            for module, _ in stream.pause_at(block, names):
                sums[block] = sums_at(at_experts(stream, module), by_block[block].experts)
            stream.unload(block)
            progress.advance()
        if at_end is not None:
            at_end(stream)
    return sums


def sums_at(here: AtExperts, experts: int) -> ExpertSums:
    """Over all batches of all ranks that wait at the experts, in their order; a step of every rank."""
    found: list[tuple[int, torch.Tensor]] = []
    for expert in range(experts):
        for batch, tokens in zip(here.batches, here.tokens_of(expert), strict=True):
            if len(tokens):
                outputs, gates = outputs_of(here.module, expert, batch.hidden[tokens]), batch.gates_of(expert, tokens)
                found.append((expert, expert_sums(outputs, gates, sum_dtype(outputs.device))))
    sums = ExpertSums.of(experts)
    parts = torch.stack([part for _, part in found]).tolist() if found else []
    for of_rank in here.ranks.gathered([(expert, part) for (expert, _), part in zip(found, parts, strict=True)]):
        for expert, part in of_rank:
            sums.add(expert, part)
    return sums
