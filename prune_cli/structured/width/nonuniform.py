"""-o uniform=false: each block gets a size of its own by CFSP's coarse stage, how far it turns the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from methods.structured._sizes import coarse_shares, proportional_sizes
from methods.structured.width import default_multiple
from prune_cli.engine.run_context import Run
from prune_cli.structured.hidden_states import known_states
from prune_cli.structured.prepare import PreparedStructure, asked_share
from prune_cli.structured.statistics_file import measured
from prune_cli.structured.units import CoupledGroup


def angles_of_blocks(run: Run[PreparedStructure]) -> list[float]:
    """The mean angular distance between input and output of every block of the dense model, measured if not known."""
    distances = measured(run, lambda known: known_states(run, known)).tensors["distances"]
    return torch.diagonal(distances, 1).tolist()


def with_sizes(prepared: PreparedStructure, group: CoupledGroup, angles: Sequence[float]) -> CoupledGroup:
    """`part` with as many units over all blocks as the request keeps, spread by `angles` (one for every block)."""
    blocks = sorted(group.consumers)
    multiple = (prepared.options.multiple or default_multiple(group.units)) if group.name == "mlp" else 1
    keep = int((1 - asked_share(prepared.request, "unit")) * group.units * len(blocks) / multiple + 0.5) * multiple
    shares = coarse_shares(torch.tensor([angles[block] for block in blocks]))
    sizes = proportional_sizes(shares, [group.units] * len(blocks), keep, multiple)
    return replace(group, sizes=dict(zip(blocks, sizes, strict=True)))
