"""One pass of the dense model: what every expert makes of the tokens that are sent to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.batch import Batch
from methods.structured.experts import SUMS, expert_sums
from prune_cli.engine.expert_inputs import AtExperts, at_experts
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError
from prune_cli.model.moe import outputs_of
from prune_cli.progress import Progress
from prune_cli.structured.moe.mixtures import Mixture


def measure_experts(
    job: OpenModel, mixtures: Sequence[Mixture], batches: Sequence[Batch], progress: Progress
) -> dict[int, dict[str, list[float]]]:
    """For every block with experts the sums of `methods.structured.experts.SUMS`, one entry an expert.

    Raises PruneError where outputs are not finite.
    """
    by_block = {mixture.block: mixture for mixture in mixtures}
    sums: dict[int, dict[str, list[float]]] = {}
    progress.stage("Measuring the experts", len(job.model.blocks))
    with Stream(job.model, batches) as stream:
        for block in range(len(job.model.blocks)):
            stream.load(block)
            names = [by_block[block].tensor] if block in by_block else []
            for module, _ in stream.pause_at(block, names):
                sums[block] = _sums(at_experts(stream, module), by_block[block].experts)
            stream.unload(block)
            progress.advance()
    for block, found in sums.items():
        if not torch.isfinite(torch.tensor(list(found.values()))).all():
            raise PruneError(
                f"The outputs of the experts of block {block} are not finite: the forward pass overflows; "
                "try --dtype float32."
            )
    return sums


def _sums(here: AtExperts, experts: int) -> dict[str, list[float]]:
    sums = {name: [0.0] * experts for name in SUMS}
    for expert in range(experts):
        for batch in here.batches:
            tokens = batch.tokens_of(expert)
            if len(tokens):
                outputs = outputs_of(here.module, expert, batch.hidden[tokens])
                for name, value in expert_sums(outputs, batch.gates_of(expert, tokens)).items():
                    sums[name][expert] += value
    return sums
