"""Prunes the maps of one block while the batches pass through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch

from calibration.statistics import ACCUMULATORS, BY_SAMPLE, Accumulator, Cross, RowSketch
from prune_cli.lockstep import SameInputs
from prune_cli.memory import home_of_gram
from prune_cli.plan import ROLES_WITH_INPUTS, matrix_shape
from prune_cli.prepare import Prepared
from prune_cli.progress import Progress
from prune_cli.prune_map import PrunedMap, Settings, prune_map
from prune_cli.residual import residual_drift, residual_factors
from prune_cli.stream import Stream

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

    def __init__(
        self, needs: Sequence[str], inputs: int, tokens: int, device: torch.device, *, with_dense: bool
    ) -> None:
        home = home_of_gram(inputs, device, 1 + with_dense) if "gram" in needs else device
        self._accumulators: dict[str, Accumulator] = {
            name: ACCUMULATORS[name](inputs, home if name == "gram" else device) for name in needs
        }
        self._cross = Cross(inputs, inputs, home) if with_dense else None
        self.home = home
        self._sketch = RowSketch(sketch_rows(tokens), inputs, device, _SKETCH_SEED)
        self._values: dict[str, torch.Tensor] | None = None

    def add(self, tensor: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """Take in the input of one batch, (..., in), and what the dense model has in its place."""
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        for name, accumulator in self._accumulators.items():
            for part in rows.split(tensor.shape[-2]) if name in BY_SAMPLE else (rows,):
                accumulator.add(part)
        self._sketch.add(rows)
        if self._cross is not None and dense is not None:
            self._cross.add(dense.detach().reshape(rows.shape), rows)

    def values(self) -> dict[str, torch.Tensor]:
        if self._values is None:
            self._values = {name: accumulator.value() for name, accumulator in self._accumulators.items()}
            if self._cross is not None:
                self._values["cross"] = self._cross.value()
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

    def run(self, stream: Stream, block: int) -> None:
        """Single pass: a map is pruned when all batches wait at it, so its inputs come from maps already pruned."""
        self._prune_blind()
        for name, inputs in stream.stops(block, list(self._maps)):
            self._serve(name, inputs)

    def run_twice(self, stream: Stream, block: int) -> None:
        """The authors' protocol: all statistics come from the dense block, then the pruned block makes the outputs."""
        stream.rehearse(block, list(self._maps), self._observe)
        for name, statistics in self._observed.items():
            self._prune(name, statistics)
        self._prune_blind()
        stream.through(block)

    def run_outside_blocks(self, stream: Stream) -> None:
        """Prune what lies outside the blocks; the batches end at the output head if it is among them."""
        self._prune_blind()
        for name in self._heads:
            self._serve(name, stream.stop_at_head(name))

    def _prune_blind(self) -> None:
        """Tensors that have no inputs (norms, biases, tables), for methods that need none."""
        for name, place in self._blind.items():
            self._finish(name, prune_map(place, self._tensors[name], self._settings, {}, None))

    def _new_statistics(self, name: str, *, with_dense: bool = False) -> InputStatistics:
        inputs = matrix_shape(self._places[name])[1]
        settings = self._settings
        return InputStatistics(settings.pipeline.needs, inputs, self._tokens, settings.device, with_dense=with_dense)

    def _serve(
        self,
        name: str,
        inputs: Sequence[torch.Tensor],
        dense: Sequence[torch.Tensor] | None = None,
        lost: Sequence[torch.Tensor] | None = None,
    ) -> None:
        if not self._same_inputs.repeated(inputs) or self._statistics is None:
            self._statistics = self._new_statistics(name, with_dense=dense is not None)
            for tensor, other in zip(inputs, dense or [None] * len(inputs), strict=True):
                self._statistics.add(tensor, other)
        drift = {} if lost is None else {"drift": self._drift(name, inputs, lost)}
        self._prune(name, self._statistics, drift)

    def _drift(self, name: str, inputs: Sequence[torch.Tensor], lost: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum over tokens of r^T x (out, in), r being what the residual stream has lost."""
        assert self._statistics is not None
        outputs, width = matrix_shape(self._places[name])
        total = Cross(outputs, width, self._statistics.home)
        for r, x in zip(lost, inputs, strict=True):
            total.add(r.reshape(-1, outputs), x.reshape(-1, width))
        return total.value()

    def _observe(self, name: str, tensor: torch.Tensor) -> None:
        shared = self._same_inputs.repeated([tensor])
        if name not in self._observed:
            last = next(reversed(self._observed.values()), None) if shared else None
            self._observed[name] = last if last is not None else self._new_statistics(name)
        if not shared:
            self._observed[name].add(tensor)

    def _prune(self, name: str, statistics: InputStatistics, own: Mapping[str, torch.Tensor] | None = None) -> None:
        """`own` statistics are of this map alone, the others of all that share its inputs."""
        values = {**statistics.values(), **(own or {})}
        result = prune_map(self._places[name], self._tensors[name], self._settings, values, statistics.rows())
        self._finish(name, result)

    def _finish(self, name: str, result: PrunedMap) -> None:
        self._model.set_weight(self._places[name], result.stored)
        self.pruned[name] = result
        self._progress.advance()


def run_beside_dense(pruners: Sequence[BlockPruner], streams: Sequence[Stream], dense: Stream, block: int) -> None:
    """Like `BlockPruner.run`, with the dense model's inputs of the same map at hand.

    Several models, each with its pruner and stream, may go beside one dense stream: what they prune is called the same.
    """
    names = list(pruners[0]._maps)
    factors = residual_factors(dense, block, dense.model.linear_maps(block))
    with ExitStack() as stack:
        drifts = [stack.enter_context(residual_drift(stream, dense, factors)) for stream in streams]
        for pruner in pruners:
            pruner._prune_blind()
        stops = [stream.stops(block, names) for stream in (*streams, dense)]
        for *arrived, (same, others) in zip(*stops, strict=True):
            for pruner, drift, (name, inputs) in zip(pruners, drifts, arrived, strict=True):
                assert name == same
                pruner._serve(name, inputs, others, drift.at(name, len(inputs)))
