"""Everything that is settled before any weight is touched: the checkpoint, the model on meta, the plan, the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from calibration.tokens import TokenSet
from methods._allocation import mean_sparsity
from methods._pattern import Pattern, Unstructured
from prune_cli.checkpoint.preflight import check_space
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.open_model import OpenModel, open_model
from prune_cli.engine.self_calibration import copies_for
from prune_cli.errors import RequestError
from prune_cli.model.orientation import matrix_shape
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.packed.output import config_of_output, keeps_packed, output_bytes
from prune_cli.ranks.ranks import ALONE, Ranks
from prune_cli.request.allocation import FILE, read_allocation
from prune_cli.request.pipeline import Pipeline
from prune_cli.request.request import (
    PruneRequest,
)
from prune_cli.sparse.parallel_files import FILES_AT_A_TIME
from prune_cli.sparse.reencode import sparse_config
from prune_cli.unstructured.plan import Decision, pattern_of, plan_tensors


@dataclass(frozen=True)
class PruningPlan(OpenModel):
    """What a request for sparse weights means tensor by tensor; `pattern` is the one asked for, of the whole.

    `config` is the text of the output's config.json, None for the input's.
    """

    decisions: dict[str, Decision]
    pipeline: Pipeline
    pattern: Pattern
    allocation_file: dict[str, float] | None
    config: str | None

    def copies(self, tokens: int) -> int:
        if self.request.self_calibration != "auto":
            return self.request.self_calibration
        widest = max(matrix_shape(info)[1] for info in self.pruned_infos().values())
        return copies_for(tokens, widest) if "gram" in self.pipeline.needs else 0

    def copies_of(self, given: TokenSet) -> int:
        """As `copies`; `auto` leaves samples with images or the like as they are, of which none can be sampled."""
        left_open = self.request.self_calibration == "auto"
        return 0 if left_open and given.beside else self.copies(given.windows.tokens)

    def pruned_infos(self, group: int | None = None) -> dict[str, TensorInfo]:
        """The tensors to prune: of one block, of what lies outside (group = number of blocks), or all of them."""
        blocks = len(self.model.blocks)
        return {
            name: decision.info
            for name, decision in self.decisions.items()
            if decision.prune
            and (group is None or (blocks if decision.info.block is None else decision.info.block) == group)
        }

    def pruned_names(self, group: int | None = None) -> list[str]:
        return list(self.pruned_infos(group))


def prepare(request: PruneRequest, *, writes: bool = True, ranks: Ranks = ALONE) -> PruningPlan:
    """Check all that can be checked without weights; raises as `open_model` does."""
    request.check()
    pipeline = request.pipeline()
    opened = open_model(request, writes=writes, ranks=ranks)
    if request.match_blocks and keeps_packed(opened.checkpoint):
        raise RequestError("--match-blocks trains weights, which --packed keep cannot store: add --packed bf16.")
    config, sparse = config_of_output(opened.checkpoint), request.format == "sparse"
    if sparse:
        config = sparse_config(opened.checkpoint, opened.source.folder, config, self_contained=request.self_contained)
    if writes and ranks.first:
        nbytes = output_bytes(opened.checkpoint)
        check_space(request.out, nbytes + (_largest_files(opened.checkpoint) if sparse else 0))
    decisions = plan_tensors(opened.model, request, pipeline)
    allocation_file = _allocation_file(request, decisions)
    return PruningPlan(
        **vars(opened),
        decisions=decisions,
        pipeline=pipeline,
        pattern=pattern_of(request) if allocation_file is None else _mean_pattern(allocation_file, opened.checkpoint),
        allocation_file=allocation_file,
        config=config,
    )


def _largest_files(checkpoint: Checkpoint) -> int:
    """While files are encoded, they are there twice."""
    sizes = sorted((checkpoint.folder / file).stat().st_size for file in checkpoint.files)
    return sum(sizes[-FILES_AT_A_TIME:])


def _allocation_file(request: PruneRequest, decisions: Mapping[str, Decision]) -> dict[str, float] | None:
    if not request.allocate.startswith(FILE):
        return None
    return read_allocation(request.allocate, [name for name, decision in decisions.items() if decision.prune])


def _mean_pattern(table: Mapping[str, float], checkpoint: Checkpoint) -> Unstructured:
    return Unstructured(mean_sparsity(table, {name: checkpoint.entries[name].count for name in table}))
