"""-o uniform=false: each block gets a size of its own by CFSP's coarse stage, how far it turns the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from calibration.tokens import TokenSet
from methods.structured.sizes import coarse_shares, proportional_sizes
from methods.structured.width import default_multiple
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.engine.open_model import pick_batch_size
from prune_cli.progress import Progress
from prune_cli.request.request import PruneRequest
from prune_cli.structured.hidden_states import known_states
from prune_cli.structured.prepare import PreparedStructure, asked_share
from prune_cli.structured.statistics_file import Statistics, measured
from prune_cli.structured.units import CoupledGroup


def angles_of_blocks(
    request: PruneRequest, job: PreparedStructure, calibration: TokenSet, output: OutputFolder, progress: Progress
) -> list[float]:
    """The mean angular distance between input and output of every block of the dense model, measured if not known."""

    def measure(known: Statistics) -> Statistics:
        batches = calibration.windows.split(pick_batch_size(request.batch_size, job.device, calibration.ids.shape[1]))
        return known_states(job, batches, known, output, progress)

    distances = measured(request, job, output, calibration, measure).tensors["distances"]
    return torch.diagonal(distances, 1).tolist()


def with_sizes(
    request: PruneRequest, job: PreparedStructure, group: CoupledGroup, angles: Sequence[float]
) -> CoupledGroup:
    """`part` with as many units over all blocks as the request keeps, spread by `angles` (one for every block)."""
    blocks = sorted(group.consumers)
    multiple = (job.options.multiple or default_multiple(group.units)) if group.name == "mlp" else 1
    keep = int((1 - asked_share(request, "unit")) * group.units * len(blocks) / multiple + 0.5) * multiple
    shares = coarse_shares(torch.tensor([angles[block] for block in blocks]))
    sizes = proportional_sizes(shares, [group.units] * len(blocks), keep, multiple)
    return replace(group, sizes=dict(zip(blocks, sizes, strict=True)))
