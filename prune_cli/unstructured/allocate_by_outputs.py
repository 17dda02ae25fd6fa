"""`--allocate sensitivity`: all weights compete by what the output of their block would lose without each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from calibration.batch import Batch
from methods._allocation import ScoreHistogram, output_scores, to_budget
from prune_cli.engine.memory import no_holes
from prune_cli.engine.output_sensitivity import first_batches, output_sensitivity
from prune_cli.engine.stream import Stream
from prune_cli.model.orientation import as_matrix
from prune_cli.progress import Progress
from prune_cli.unstructured.prepare import PruningPlan

# Weights matter less only while the others are there: tables that spread farther lose more (docs/quality.md).
_SPREAD = 0.2


@dataclass(frozen=True)
class OutputScores:
    """The scores of all weights that could be measured; `failed` tells why those of a block could not.

    `outputs` (out,) are the squared derivatives by the outputs of linear layers.
    """

    histogram: ScoreHistogram
    outputs: Mapping[str, torch.Tensor]
    failed: Mapping[int, str]

    def sparsities(self, asked: float, counts: Mapping[str, int]) -> dict[str, float]:
        """By tensor, of `counts` weights each: what lies under one threshold, but within _SPREAD of `asked`."""
        if not self.outputs.keys() & counts.keys():
            return {}
        wished = self.histogram.sparsities(asked, counts)
        return to_budget(wished, {name: counts[name] for name in wished}, asked, _SPREAD)


@torch.no_grad()
def measure_scores(plan: PruningPlan, batches: Sequence[Batch], progress: Progress) -> OutputScores:
    """One pass of the dense model with the first of `batches`, and one backward pass of each block by itself."""
    progress.stage("Measuring sensitivities", len(plan.model.blocks))
    histogram = ScoreHistogram()
    outputs: dict[str, torch.Tensor] = {}
    failed: dict[int, str] = {}
    few = first_batches(batches)
    with no_holes(), Stream(plan.model, few) as stream:
        for block in range(len(plan.model.blocks)):
            tensors = stream.load(block)
            names = [name for name in plan.model.linear_layers(block) if plan.decisions[name].prune]
            try:
                found = output_sensitivity(stream, block, names, few, plan.request.seed) if names else {}
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                found, failed[block] = {}, str(error)
            for name, sensitivity in found.items():
                weight = as_matrix(plan.decisions[name].info, tensors[name]).to(plan.device, torch.float32)
                histogram.add(name, output_scores(weight, sensitivity.outputs, sensitivity.inputs))
                outputs[name] = sensitivity.outputs
            stream.run_block(block)
            stream.unload(block)
            progress.advance()
    return OutputScores(histogram, outputs, failed)
