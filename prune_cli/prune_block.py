"""Prunes the maps of one block while the batches pass through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from calibration.statistics import ACCUMULATORS, Accumulator, RowSketch
from prune_cli.lockstep import Lockstep, SameInputs
from prune_cli.plan import ROLES_WITH_INPUTS, matrix_shape
from prune_cli.prepare import Prepared
from prune_cli.progress import Progress
from prune_cli.prune_map import PrunedMap, Settings, prune_map

_SKETCH_SEED = 0
# Up to this many tokens the output error is exact; above, it is estimated from a sketch of 1/64 of the tokens.
_EXACT_TOKENS = 1024
_SKETCH_LIMITS = (128, 1024)


def sketch_rows(tokens: int) -> int:
    """How many rows stand for `tokens` tokens when a map's output error is measured."""
    if tokens <= _EXACT_TOKENS:
        return tokens
    least, most = _SKETCH_LIMITS
    return min(max(tokens // 64, least), most)


class InputStatistics:
    """What is known about the inputs of one map, or of several that read the same tensor."""

    def __init__(self, needs: Sequence[str], inputs: int, tokens: int, device: torch.device) -> None:
        self._accumulators: dict[str, Accumulator] = {name: ACCUMULATORS[name](inputs, device) for name in needs}
        self._sketch = RowSketch(sketch_rows(tokens), inputs, device, _SKETCH_SEED)
        self._values: dict[str, torch.Tensor] | None = None

    def add(self, tensor: torch.Tensor) -> None:
        """Take in the input of one batch, (..., in)."""
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        for accumulator in self._accumulators.values():
            accumulator.add(rows)
        self._sketch.add(rows)

    def values(self) -> dict[str, torch.Tensor]:
        if self._values is None:
            self._values = {name: accumulator.value() for name, accumulator in self._accumulators.items()}
        return self._values

    def rows(self) -> torch.Tensor:
        return self._sketch.value()


class BlockPruner:
    """The tensors of one block (or of what lies outside the blocks) that are to be pruned, and what became of them."""

    def __init__(
        self,
        job: Prepared,
        tensors: Mapping[str, torch.Tensor],
        names: Sequence[str],
        settings: Settings,
        tokens: int,
        progress: Progress,
    ) -> None:
        places = {name: job.decisions[name].place for name in names}
        self._model = job.model
        self._maps = {name: place for name, place in places.items() if place.role == "linear map"}
        self._blind = {name: place for name, place in places.items() if place.role not in ROLES_WITH_INPUTS}
        self._heads = {name: place for name, place in places.items() if place.role == "output head"}
        self._places = places
        self._tensors = tensors
        self._settings = settings
        self._tokens = tokens
        self._progress = progress
        self._same_inputs = SameInputs()
        self._statistics: InputStatistics | None = None
        self._observed: dict[str, InputStatistics] = {}
        self.pruned: dict[str, PrunedMap] = {}

    @property
    def unreached(self) -> list[str]:
        """Maps that no batch called (some models multiply by a weight without calling its module): they stay dense."""
        return [name for name in self._places if name not in self.pruned]

    def run(self, stream: Lockstep, block: int, *, twice: bool) -> None:
        """Bring the batches through `block` and leave it pruned.

        Single pass: a map is pruned when all batches wait at it, so its inputs come from maps already pruned. Twice
        (the authors' protocol): all statistics come from the dense block, then the pruned block makes the outputs.
        """
        if twice:
            stream.rehearse(block, self._modules(), self._observe)
            for name, statistics in self._observed.items():
                self._prune(name, statistics)
            self._prune_blind()
            stream.through(block, {})
        else:
            self._prune_blind()
            stream.through(block, self._modules(), self._serve)

    def run_outside_blocks(self, stream: Lockstep) -> None:
        """Prune what lies outside the blocks; the batches end at the output head if it is among them."""
        self._prune_blind()
        for name, place in self._heads.items():
            self._serve(name, stream.stop_after_blocks(self._model.model.get_submodule(place.module_name)))

    def _prune_blind(self) -> None:
        """Tensors that have no inputs (norms, biases, tables), for methods that need none."""
        for name, place in self._blind.items():
            self._finish(name, prune_map(place, self._tensors[name], self._settings, {}, None))

    def _modules(self) -> dict[nn.Module, str]:
        return {self._model.model.get_submodule(place.module_name): name for name, place in self._maps.items()}

    def _new_statistics(self, name: str) -> InputStatistics:
        inputs = matrix_shape(self._places[name])[1]
        return InputStatistics(self._settings.method.needs, inputs, self._tokens, self._settings.device)

    def _serve(self, name: str, inputs: Sequence[torch.Tensor]) -> None:
        if not self._same_inputs.repeated(inputs) or self._statistics is None:
            self._statistics = self._new_statistics(name)
            for tensor in inputs:
                self._statistics.add(tensor)
        self._prune(name, self._statistics)

    def _observe(self, name: str, tensor: torch.Tensor) -> None:
        shared = self._same_inputs.repeated([tensor])
        if name not in self._observed:
            last = next(reversed(self._observed.values()), None) if shared else None
            self._observed[name] = last if last is not None else self._new_statistics(name)
        if not shared:
            self._observed[name].add(tensor)

    def _prune(self, name: str, statistics: InputStatistics) -> None:
        result = prune_map(
            self._places[name], self._tensors[name], self._settings, statistics.values(), statistics.rows()
        )
        self._finish(name, result)

    def _finish(self, name: str, result: PrunedMap) -> None:
        self._model.set_weight(self._places[name], result.stored)
        self.pruned[name] = result
        self._progress.advance()
