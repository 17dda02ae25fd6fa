"""Prunes the experts of one block, each by its own tokens, while all batches wait there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import nn

from calibration.statistics import SquaredNorm
from prune_cli.experts import Routed, before_down
from prune_cli.input_statistics import InputStatistics
from prune_cli.model import Skeleton
from prune_cli.places import Place
from prune_cli.plan import matrix_shape
from prune_cli.prune_map import PrunedMap, Settings, as_matrix, join_slices, prune_slice
from prune_cli.stream import Stream

# With fewer tokens an expert is pruned by those of all tokens, whoever they were sent to.
FEWEST_TOKENS = 32
_OWN_TARGET = "follows its own dense outputs: the dense model's inputs of its tokens are not known in this architecture"


@dataclass(frozen=True)
class AtExperts:
    """A model whose batches wait at the experts `module` of a block; its weights may change in between."""

    module: nn.Module
    batches: Sequence[Routed]


class ExpertsPruner:
    """The tensors of the experts of one block, as stored, by name; `model` computes with them."""

    def __init__(
        self, model: Skeleton, places: Mapping[str, Place], tensors: Mapping[str, torch.Tensor], settings: Settings
    ) -> None:
        self._model = model
        self._places = places
        self._tensors = tensors
        self._settings = settings
        self._pruned: dict[str, list[PrunedMap]] = {name: [] for name in places}

    def prune(self, here: AtExperts, dense: AtExperts | None, *, at_once: bool) -> dict[str, PrunedMap]:
        """Prune expert by expert, the last map by what the pruned ones before it give, with `at_once` the dense ones.

        With `dense`, an expert follows what the dense one makes of the dense model's hidden states of the same tokens,
        wherever the dense model sends them.
        """
        aligned = all(batch.every_token for batch in here.batches)
        own = [_OWN_TARGET] if dense is not None and not aligned else []
        dense = dense if aligned else None
        for place in self._places.values():
            if place.slices > 1:
                self._model.make_own(place)
        experts = next(place.expert.experts for place in self._places.values() if place.expert is not None)
        for expert in range(experts):
            tokens, few = _tokens_of(expert, here.batches)
            notes = (*few, *own)
            early = self._statistics(expert, here, dense, tokens, down=True) if at_once else None
            self._prune(expert, self._statistics(expert, here, dense, tokens, down=False), notes, down=False)
            self._prune(expert, early or self._statistics(expert, here, dense, tokens, down=True), notes, down=True)
        return {
            name: join_slices(maps) if self._places[name].slices > 1 else maps[0] for name, maps in self._pruned.items()
        }

    def _names(self, expert: int, *, down: bool) -> list[str]:
        """The tensors with that map of the expert."""
        return [
            name
            for name, place in self._places.items()
            if place.expert is not None and place.expert.down == down and place.expert.index in (None, expert)
        ]

    def _statistics(
        self, expert: int, here: AtExperts, dense: AtExperts | None, tokens: Sequence[torch.Tensor], *, down: bool
    ) -> InputStatistics | None:
        names = self._names(expert, down=down)
        if not names:
            return None
        needs, inputs = self._settings.pipeline.needs, matrix_shape(self._places[names[0]])[1]
        count = sum(len(each) for each in tokens)
        found = InputStatistics(needs, inputs, count, self._settings.device, with_dense=dense is not None)
        others = dense.batches if dense is not None else repeat(None)
        for batch, other, numbers in zip(here.batches, others, tokens, strict=False):
            if len(numbers):
                rows = _inputs(here.module, expert, batch, numbers, down=down)
                found.add(rows, other and dense and _inputs(dense.module, expert, other, numbers, down=down))
        return found

    def _prune(self, expert: int, statistics: InputStatistics | None, notes: Sequence[str], *, down: bool) -> None:
        if statistics is None:
            return
        for name in self._names(expert, down=down):
            place, stored = self._places[name], self._tensors[name]
            matrix = stored[expert] if place.slices > 1 else stored
            result = prune_slice(place, expert, matrix, self._settings, statistics.values(), statistics.rows())
            self._model.set_expert(place, expert, result.stored)
            self._pruned[name].append(replace(result, notes=(*result.notes, *notes)))


def _tokens_of(expert: int, batches: Sequence[Routed]) -> tuple[list[torch.Tensor], list[str]]:
    """The numbers of the expert's tokens, batch by batch; where they are too few those of all, and a note on it."""
    tokens = [batch.tokens_of(expert) for batch in batches]
    count = sum(len(each) for each in tokens)
    if count >= FEWEST_TOKENS:
        return tokens, []
    everything = [batch.all_tokens() for batch in batches]
    note = f"only {count} calibration tokens were sent to this expert: pruned by what all tokens would give it"
    return everything, [note]


def _inputs(module: nn.Module, expert: int, batch: Routed, numbers: torch.Tensor, *, down: bool) -> torch.Tensor:
    rows = batch.hidden[numbers]
    return before_down(module, expert, rows) if down else rows


def experts_by_module(places: Mapping[str, Place]) -> dict[str, dict[str, Place]]:
    """The tensors of experts, grouped by the module that computes with them."""
    groups: dict[str, dict[str, Place]] = {}
    for name, place in places.items():
        if place.expert is not None:
            groups.setdefault(place.module_name, {})[name] = place
    return groups


def at_experts(stream: Stream, module: str) -> AtExperts:
    """What `stream` has at a stop at the experts called `module`."""
    experts = stream.model.model.get_submodule(module)
    return AtExperts(experts, [Routed.of(experts, each) for each in stream.arguments()])


def expert_scores(
    places: Mapping[str, Place], tensors: Mapping[str, torch.Tensor], here: AtExperts, device: torch.device
) -> dict[str, torch.Tensor]:
    """The Wanda scores of the experts' tensors, (out, in) or (experts, out, in), by the weights as they are."""
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in places}
    experts = next(place.expert.experts for place in places.values() if place.expert is not None)
    for expert in range(experts):
        tokens, _ = _tokens_of(expert, here.batches)
        norms: dict[bool, torch.Tensor] = {}
        for name, place in places.items():
            if place.expert is None or place.expert.index not in (None, expert):
                continue
            down = place.expert.down
            if down not in norms:
                squares = SquaredNorm(matrix_shape(place)[1], device)
                for batch, numbers in zip(here.batches, tokens, strict=True):
                    squares.add(_inputs(here.module, expert, batch, numbers, down=down))
                norms[down] = squares.value().sqrt()
            matrix = as_matrix(place, tensors[name][expert] if place.slices > 1 else tensors[name])
            scores[name].append(matrix.to(device, torch.float32).abs() * norms[down])
    return {name: torch.stack(found) if places[name].slices > 1 else found[0] for name, found in scores.items()}
