"""What is known of the inputs of the experts of one block, each by its own tokens, while all batches wait there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import nn

from prune_cli.engine.expert_inputs import AtExperts, ExpertTokens, tokens_of_experts
from prune_cli.engine.input_statistics import InputStatistics
from prune_cli.model.moe import before_down
from prune_cli.model.orientation import as_matrix, matrices, matrix_shape
from prune_cli.model.routed import Routed
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.unstructured.prune_linear import LinearInputs, Settings

_OWN_TARGET = "follows its own dense outputs: the dense model's inputs of its tokens are not known in this architecture"


@dataclass(frozen=True)
class Experts:
    """The experts of one block, where all batches wait; `infos` are their tensors, `model` computes with them.

    With `dense`, an expert follows what the dense one makes of the dense model's hidden states of the same tokens,
    wherever the dense model sends them.
    """

    model: StreamedModel
    infos: Mapping[str, TensorInfo]
    settings: Settings
    here: AtExperts
    dense: AtExperts | None = None

    def inputs(self, *, from_dense_block: bool) -> Iterator[list[LinearInputs]]:
        """What can be pruned side by side: the layers of one expert for every rank, each to be pruned before the next.

        The inputs of an expert's last linear layer come from the pruned ones before it, or else `from_dense_block`.
        """
        aligned = self.here.every_token
        own = (_OWN_TARGET,) if self.dense is not None and not aligned else ()
        dense = self.dense if aligned else None
        for info in self.infos.values():
            if info.slices > 1:
                self.model.make_own(info)
        experts = next(info.expert.experts for info in self.infos.values() if info.expert is not None)
        tokens = [replace(each, notes=(*each.notes, *own)) for each in tokens_of_experts(self.here, experts)]
        ranks = self.here.ranks.count
        for first in range(0, experts, ranks):
            abreast = range(first, min(first + ranks, experts))
            early = {e: self._maps(e, dense, tokens[e], down=True) for e in abreast if from_dense_block}
            # Nothing here holds the statistics while the next are gathered.
            yield [each for e in abreast for each in self._maps(e, dense, tokens[e], down=False)]
            yield [each for e in abreast for each in early.pop(e, None) or self._maps(e, dense, tokens[e], down=True)]

    def _names(self, expert: int, *, down: bool) -> list[str]:
        """The tensors with that linear layer of the expert."""
        return [
            name
            for name, info in self.infos.items()
            if info.expert is not None and info.expert.down == down and info.expert.index in (None, expert)
        ]

    def _maps(self, expert: int, dense: AtExperts | None, tokens: ExpertTokens, *, down: bool) -> list[LinearInputs]:
        """Those of `expert`; but for its owner without what is known of their inputs."""
        names, owner = self._names(expert, down=down), expert % self.here.ranks.count
        if not names:
            return []
        found = self._statistics(expert, names[0], dense, tokens, down=down).combine()
        if owner != self.here.ranks.rank:
            return [LinearInputs(self.infos[name], expert, owner=owner) for name in names]
        return [
            LinearInputs(self.infos[name], expert, found.values(), found.rows(), tokens.notes, owner) for name in names
        ]

    def _statistics(
        self, expert: int, name: str, dense: AtExperts | None, tokens: ExpertTokens, *, down: bool
    ) -> InputStatistics:
        needs, inputs = self.settings.pipeline.needs, matrix_shape(self.infos[name])[1]
        device, with_dense = self.settings.device, dense is not None
        found = InputStatistics(needs, inputs, device, with_dense=with_dense, sketch_of=tokens.total)
        found.share(self.here.ranks, tokens.before)
        others = dense.batches if dense is not None else repeat(None)
        for batch, other, numbers in zip(self.here.batches, others, tokens.numbers, strict=False):
            if len(numbers):
                rows = _inputs(self.here.module, expert, batch, numbers, down=down)
                found.add_rows(rows, other and dense and _inputs(dense.module, expert, other, numbers, down=down))
        return found


def _inputs(module: nn.Module, expert: int, batch: Routed, numbers: torch.Tensor, *, down: bool) -> torch.Tensor:
    rows = batch.hidden[numbers]
    return before_down(module, expert, rows) if down else rows


def expert_scores(
    infos: Mapping[str, TensorInfo], tensors: Mapping[str, torch.Tensor], here: AtExperts, device: torch.device
) -> dict[str, torch.Tensor]:
    """The Wanda scores of the experts' tensors, (out, in) or (experts, out, in), by the weights as they are."""
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in infos}
    experts = next(info.expert.experts for info in infos.values() if info.expert is not None)
    for expert, tokens in enumerate(tokens_of_experts(here, experts)):
        norms: dict[bool, torch.Tensor] = {}
        for name, info in infos.items():
            if info.expert is None or info.expert.index not in (None, expert):
                continue
            down = info.expert.down
            if down not in norms:
                statistics = InputStatistics(("sq_norm",), matrix_shape(info)[1], device)
                statistics.share(here.ranks, tokens.before)
                for batch, numbers in zip(here.batches, tokens.numbers, strict=True):
                    statistics.add_rows(_inputs(here.module, expert, batch, numbers, down=down))
                norms[down] = statistics.combine().values()["sq_norm"].sqrt()
            matrix = as_matrix(info, matrices(info, tensors[name])[expert] if info.slices > 1 else tensors[name])
            scores[name].append(matrix.to(device, torch.float32).abs() * norms[down])
    return {name: torch.stack(found) if infos[name].slices > 1 else found[0] for name, found in scores.items()}
