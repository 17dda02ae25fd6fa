"""Prunes the linear layers of one block while the batches pass through it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing

import torch

from prune_cli.engine.expert_inputs import AtExperts, at_experts, experts_by_module
from prune_cli.engine.input_statistics import InputStatistics
from prune_cli.engine.residual_drift import residual_drift, residual_factors, wanted_outputs
from prune_cli.engine.same_inputs import SameInputs
from prune_cli.engine.stream import Stream
from prune_cli.errors import PruneError
from prune_cli.model.moe import routed
from prune_cli.model.orientation import as_matrix, matrices, matrix_shape
from prune_cli.model.routed import Routed
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.progress import Progress
from prune_cli.ranks.owners import owners, solving_cost
from prune_cli.request.request import CalibrateBy
from prune_cli.unstructured.plan import ROLES_WITH_INPUTS
from prune_cli.unstructured.prune_experts import Experts
from prune_cli.unstructured.prune_linear import LinearInputs, PrunedLinear, Settings, join_slices, prune_linear


class BlockPruner:
    """The tensors of one block (or of what lies outside the blocks) that are to be pruned, and what became of them.

    `tensors` are those of the block as stored, by name; the model of `stream` computes with them.
    """

    def __init__(
        self,
        stream: Stream,
        infos: Mapping[str, TensorInfo],
        tensors: Mapping[str, torch.Tensor],
        settings: Settings,
        progress: Progress,
    ) -> None:
        self.stream = stream
        self.settings = settings
        self.pruned: dict[str, PrunedLinear] = {}
        self._infos = infos
        self._experts = experts_by_module(infos)
        self.tensors = tensors
        self._progress = progress
        self._slices: dict[str, list[PrunedLinear]] = {}
        self._same_inputs = SameInputs()
        self._statistics: InputStatistics | None = None
        self._leader = ""
        self._ahead: list[str] = []
        self._observed: dict[str, InputStatistics] = {}
        self._routed: dict[str, list[Routed]] = {name: [] for name in self._experts}

    @property
    def unreached(self) -> list[str]:
        """What no batch called (some models multiply by a weight without calling its module): it stays dense."""
        return [name for name in self._infos if name not in self.pruned]

    @property
    def stops(self) -> list[str]:
        """Where batches wait: at every linear layer, and once at the experts, for one of their tensors."""
        linear = [name for name, info in self._infos.items() if info.role == "linear map"]
        return [*linear, *(next(iter(infos)) for infos in self._experts.values())]

    def stored(self, inputs: LinearInputs) -> torch.Tensor:
        """The matrix as stored."""
        tensor = self.tensors[inputs.info.entry.name]
        return matrices(inputs.info, tensor)[inputs.expert] if inputs.info.slices > 1 else tensor

    def _put(self, inputs: LinearInputs, values: torch.Tensor, result: PrunedLinear) -> None:
        """The model computes with the new `values` of a matrix from now on."""
        info, name, model = inputs.info, inputs.info.entry.name, self.stream.model
        if info.expert is None:
            model.set_weight(info, values)
        else:
            model.set_expert(info, inputs.expert, values)
        if info.slices > 1:
            self._slices.setdefault(name, []).append(result)
            if len(self._slices[name]) < info.slices:
                return
            result = join_slices(info, self._slices.pop(name))
        self.pruned[name] = result
        self._progress.advance()

    def prune(self, together: Sequence[LinearInputs]) -> None:
        """Each by its owner, who sends it to the other ranks."""
        ranks = self.stream.ranks
        dealt = owners([solving_cost(*matrix_shape(each.info)) for each in together], ranks.count)
        dealt = [rank if each.owner is None else each.owner for each, rank in zip(together, dealt, strict=True)]
        own = {
            place: prune_linear(each, self.stored(each), self.settings)
            for place, each in enumerate(together)
            if dealt[place] == ranks.rank
        }
        for place, (each, owner) in enumerate(zip(together, dealt, strict=True)):
            self._put(each, *ranks.from_rank(owner, lambda place=place: own.pop(place)))

    def inputs_of_pruned(self, block: int) -> Iterator[list[LinearInputs]]:
        """Single pass: a layer is pruned when all batches wait at it, so its inputs come from layers already pruned."""
        yield from self.without_inputs()
        for name, inputs in self.stream.pause_at(block, self.stops, again=self.settings.again):
            yield from self.arrived(name, inputs)

    def inputs_of_dense(self, block: int) -> Iterator[list[LinearInputs]]:
        """The authors' protocol: all statistics come from the dense block, then the pruned block makes the outputs."""
        self.stream.observe_block(block, self.stops, self._observe)
        self._combine_observed()
        yield [self._known(name, statistics) for name, statistics in self._observed.items()]
        for name, batches in self._routed.items():
            here = AtExperts(self.stream.model.model.get_submodule(name), batches, self.stream.ranks)
            yield from self._of_experts(name, here).inputs(from_dense_block=True)
        yield from self.without_inputs()
        if not self.settings.again:
            self.stream.run_block(block)

    def inputs_outside_blocks(self) -> Iterator[list[LinearInputs]]:
        """The batches end at the output head if it is among what lies outside the blocks."""
        yield from self.without_inputs()
        for name, info in self._infos.items():
            if info.role == "output head":
                yield from self.arrived(name, self.stream.stop_at_head(name))

    def without_inputs(self) -> Iterator[list[LinearInputs]]:
        """Tensors that have no inputs (norms, biases, tables), for methods that need none."""
        yield [LinearInputs(info) for info in self._infos.values() if info.role not in ROLES_WITH_INPUTS]

    def arrived(
        self,
        name: str,
        inputs: Sequence[torch.Tensor],
        dense: Stream | None = None,
        dense_inputs: Sequence[torch.Tensor] | None = None,
        drift: Sequence[torch.Tensor] | None = None,
    ) -> Iterator[list[LinearInputs]]:
        """What all batches bring to a layer or to the experts; `drift` is what the residual stream has lost there.

        With it comes what read the same inputs in the blocks before, for several ranks to prune it side by side.
        """
        if name in self._experts:
            experts = self._of_experts(name, at_experts(self.stream, name), dense and at_experts(dense, name))
            yield from experts.inputs(from_dense_block=False)
            return
        names = [name]
        with_dense = dense_inputs is not None and drift is None
        if not self.stream.shares_inputs() or self._statistics is None or with_dense > self._statistics.with_dense:
            self._statistics = self._new_statistics(name, with_dense=with_dense)
            self._statistics.add_batches(inputs, dense_inputs if with_dense else None, self.stream.here())
            self._statistics.combine()
            self._ahead = self._likely_beside(name) if drift is None else []
            names += self._ahead
        elif drift is None:
            self.stream.groups.learn(self._leader, name)
            if name in self._ahead:
                return
        own: dict[str, torch.Tensor] = {}
        if dense_inputs is not None and drift is not None:
            own["output_cross"] = self._output_cross(name, self._statistics, inputs, dense_inputs, drift)
        yield [self._known(each, self._statistics, own if each == name else {}) for each in names]

    def _output_cross(
        self,
        name: str,
        statistics: InputStatistics,
        inputs: Sequence[torch.Tensor],
        dense_inputs: Sequence[torch.Tensor],
        drift: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        weight = as_matrix(self._infos[name], self.tensors[name]).to(self.settings.device)
        # To make up for inputs that are always 0 by now did harm.
        dead = statistics.values()["gram"].diagonal().to(weight.device) == 0
        batches = self.stream.here()
        wanted = wanted_outputs(weight.masked_fill(dead, 0.0), None, dense_inputs, drift, batches)
        return statistics.output_cross(len(weight), wanted, inputs, batches).value()

    def _likely_beside(self, name: str) -> list[str]:
        """Of several ranks, what the others may prune while this one prunes `name`."""
        self._leader = name
        left = [each for each in self.stops if each != name and each not in self.pruned]
        return self.stream.groups.beside(name, left) if self.stream.ranks.several else []

    def _combine_observed(self) -> None:
        """Make what each rank has observed that of all; layers that share their inputs stay together."""
        ranks = self.stream.ranks
        if not ranks.several:
            return
        firsts: dict[InputStatistics, str] = {}
        own = {name: firsts.setdefault(statistics, name) for name, statistics in self._observed.items()}
        first_of: dict[str, str] = {}
        for known in ranks.gathered(own):
            if any(first_of.get(name, first) != first for name, first in known.items()):
                raise PruneError(
                    "The batches do not take the same way through a block of this architecture: use --calibrate-by "
                    "sublayer, or one process."
                )
            first_of |= known
        found = {
            name: (self._observed.get(name) or self._new_statistics(name)).combine()
            for name, first in first_of.items()
            if name == first
        }
        self._observed = {name: found[first] for name, first in first_of.items()}

    def _known(
        self, name: str, statistics: InputStatistics, own: Mapping[str, torch.Tensor] | None = None
    ) -> LinearInputs:
        """`own` statistics are of this layer alone, the others of all that share its inputs."""
        values = {**statistics.values(), **(own or {})}
        return LinearInputs(self._infos[name], statistics=values, rows=statistics.rows())

    def _of_experts(self, module: str, here: AtExperts, dense: AtExperts | None = None) -> Experts:
        return Experts(self.stream.model, self._experts[module], self.settings, here, dense)

    def _new_statistics(self, name: str, *, with_dense: bool = False) -> InputStatistics:
        inputs, settings = matrix_shape(self._infos[name])[1], self.settings
        found = InputStatistics(
            settings.pipeline.needs, inputs, settings.device, with_dense=with_dense, sketch_of=settings.tokens
        )
        return found.share(self.stream.ranks, self.stream.tokens_before)

    def _observe(self, name: str, arguments: list[torch.Tensor]) -> None:
        batch = self.stream.passing()
        if name in self._experts:
            module = self.stream.model.model.get_submodule(name)
            self._routed[name].append(routed(module, arguments, batch.mask))
            return
        tensor = arguments[0]
        shared = self._same_inputs.repeated([tensor])
        if name not in self._observed:
            last = next(reversed(self._observed.values()), None) if shared else None
            self._observed[name] = last if last is not None else self._new_statistics(name)
        if not shared:
            self._observed[name].add(tensor, None, batch)


def prune_block(
    pruners: Sequence[BlockPruner], block: int, calibrate_by: CalibrateBy = "sublayer", dense: Stream | None = None
) -> None:
    """Take the batches of each pruner's stream through `block`, pruning it by the protocol asked for.

    With `dense` all models go beside it, so what they prune is called the same; else each goes by itself.
    """
    if dense is not None:
        known = _beside_dense(pruners, dense, block)
    elif calibrate_by == "block":
        known = _one_by_one(pruners, [pruner.inputs_of_dense(block) for pruner in pruners])
    else:
        known = _one_by_one(pruners, [pruner.inputs_of_pruned(block) for pruner in pruners])
    with closing(known):
        for pruner, together in known:
            pruner.prune(together)
            del together  # its Gram matrices go before the next are summed


def prune_outside_blocks(pruner: BlockPruner) -> None:
    """Prune what lies outside the blocks, once all batches have passed them."""
    for together in pruner.inputs_outside_blocks():
        pruner.prune(together)


# What is pruned next, with all that is known of its inputs; it must be in the model before the next is asked for.
_Known = Generator[tuple[BlockPruner, list[LinearInputs]]]


def _of(pruner: BlockPruner, known: Iterator[list[LinearInputs]]) -> _Known:
    for together in known:
        yield pruner, together
        del together  # as above


def _one_by_one(pruners: Sequence[BlockPruner], known: Sequence[Iterator[list[LinearInputs]]]) -> _Known:
    for pruner, inputs in zip(pruners, known, strict=True):
        yield from _of(pruner, inputs)


def _beside_dense(pruners: Sequence[BlockPruner], dense: Stream, block: int) -> _Known:
    """Like `inputs_of_pruned`, with the dense model's inputs of the same layer at hand."""
    ranks, layers = dense.ranks, dense.model.linear_layers(block)
    factors = ranks.on_first(lambda: residual_factors(dense, block, layers))
    with ExitStack() as stack:
        # Weights that stay as they are cannot make up for what the stream has lost, and try at a cost.
        own = [factors if pruner.settings.pipeline.new_values else {} for pruner in pruners]
        drifts = [
            stack.enter_context(residual_drift(pruner.stream, dense, each))
            for pruner, each in zip(pruners, own, strict=True)
        ]
        for pruner in pruners:
            yield from _of(pruner, pruner.without_inputs())
        names = pruners[0].stops
        again = pruners[0].settings.again
        streams = (*(pruner.stream for pruner in pruners), dense)
        stops = [stream.pause_at(block, names, again=again) for stream in streams]
        for *arrived, (same, others) in zip(*stops, strict=True):
            for pruner, drift, (name, inputs) in zip(pruners, drifts, arrived, strict=True):
                assert name == same
                lost = drift.at(name, len(inputs))
                lost = lost if ranks.all_agree(lost is not None) else None
                yield from _of(pruner, pruner.arrived(name, inputs, dense, others, lost))
