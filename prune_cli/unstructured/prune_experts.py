"""What is known of the inputs of the experts of one block, each by its own tokens, while all batches wait there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import nn

from prune_cli.engine.expert_inputs import AtExperts, tokens_of
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

    def inputs(self, *, from_dense_block: bool) -> Iterator[LinearInputs]:
        """Expert by expert, each to be pruned before the next is asked for.

        The inputs of its last map come from the pruned ones before it, or else `from_dense_block`.
        """
        aligned = all(batch.every_token for batch in self.here.batches)
        own = [_OWN_TARGET] if self.dense is not None and not aligned else []
        dense = self.dense if aligned else None
        for info in self.infos.values():
            if info.slices > 1:
                self.model.make_own(info)
        experts = next(info.expert.experts for info in self.infos.values() if info.expert is not None)
        for expert in range(experts):
            tokens, few = tokens_of(expert, self.here.batches)
            notes = (*few, *own)
            early = self._statistics(expert, dense, tokens, down=True) if from_dense_block else None
            yield from self._maps(expert, self._statistics(expert, dense, tokens, down=False), notes, down=False)
            # Nothing here holds the statistics while the next are gathered.
            yield from self._maps(expert, early or self._statistics(expert, dense, tokens, down=True), notes, down=True)

    def _names(self, expert: int, *, down: bool) -> list[str]:
        """The tensors with that map of the expert."""
        return [
            name
            for name, info in self.infos.items()
            if info.expert is not None and info.expert.down == down and info.expert.index in (None, expert)
        ]

    def _statistics(
        self, expert: int, dense: AtExperts | None, tokens: Sequence[torch.Tensor], *, down: bool
    ) -> InputStatistics | None:
        names = self._names(expert, down=down)
        if not names:
            return None
        needs, inputs = self.settings.pipeline.needs, matrix_shape(self.infos[names[0]])[1]
        count = sum(len(each) for each in tokens)
        found = InputStatistics(needs, inputs, self.settings.device, with_dense=dense is not None, sketch_of=count)
        others = dense.batches if dense is not None else repeat(None)
        for batch, other, numbers in zip(self.here.batches, others, tokens, strict=False):
            if len(numbers):
                rows = _inputs(self.here.module, expert, batch, numbers, down=down)
                found.add_rows(rows, other and dense and _inputs(dense.module, expert, other, numbers, down=down))
        return found

    def _maps(
        self, expert: int, statistics: InputStatistics | None, notes: tuple[str, ...], *, down: bool
    ) -> Iterator[LinearInputs]:
        if statistics is not None:
            for name in self._names(expert, down=down):
                yield LinearInputs(self.infos[name], expert, statistics.values(), statistics.rows(), notes)


def _inputs(module: nn.Module, expert: int, batch: Routed, numbers: torch.Tensor, *, down: bool) -> torch.Tensor:
    rows = batch.hidden[numbers]
    return before_down(module, expert, rows) if down else rows


def expert_scores(
    infos: Mapping[str, TensorInfo], tensors: Mapping[str, torch.Tensor], here: AtExperts, device: torch.device
) -> dict[str, torch.Tensor]:
    """The Wanda scores of the experts' tensors, (out, in) or (experts, out, in), by the weights as they are."""
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in infos}
    experts = next(info.expert.experts for info in infos.values() if info.expert is not None)
    for expert in range(experts):
        tokens, _ = tokens_of(expert, here.batches)
        norms: dict[bool, torch.Tensor] = {}
        for name, info in infos.items():
            if info.expert is None or info.expert.index not in (None, expert):
                continue
            down = info.expert.down
            if down not in norms:
                statistics = InputStatistics(("sq_norm",), matrix_shape(info)[1], device)
                for batch, numbers in zip(here.batches, tokens, strict=True):
                    statistics.add_rows(_inputs(here.module, expert, batch, numbers, down=down))
                norms[down] = statistics.values()["sq_norm"].sqrt()
            matrix = as_matrix(info, matrices(info, tensors[name])[expert] if info.slices > 1 else tensors[name])
            scores[name].append(matrix.to(device, torch.float32).abs() * norms[down])
    return {name: torch.stack(found) if infos[name].slices > 1 else found[0] for name, found in scores.items()}
