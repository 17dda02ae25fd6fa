"""How much memory a run takes, estimated before it, in bytes: phase by phase, and what takes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from prune_cli.engine.activation_budget import USUAL, ActivationBudget
from prune_cli.engine.evaluate import STATES_PER_TOKEN
from prune_cli.engine.expected import Sizes
from prune_cli.engine.memory import gram_bytes
from prune_cli.engine.open_model import OpenModel, pick_batch_size, usual_length
from prune_cli.model.streamed_model import StreamedModel

# Paused forward passes keep the embeddings and the block's input, and the residual between; in attention, instead of
# the last, queries, keys and values.
_BEFORE_BLOCK, _BESIDE_WIDEST, _IN_ATTENTION = 2, 1, 3
# Logits in float32, their logarithm of the softmax and its gradient-free copy.
_FLOATS_OF_A_LOGIT = 3


@dataclass(frozen=True)
class LayersSolved:
    """Layers that get zeros or new values: weights of the largest, inputs of the widest, Gram matrices or none."""

    largest: int = 0
    widest: int = 0
    gram: bool = False


@dataclass(frozen=True)
class Part:
    """Some of a phase's memory: what it is, and what the user may change to need less of it."""

    what: str
    nbytes: int
    remedy: str = ""


# And their tables; measured as anonymous memory after importing them.
LIBRARIES = Part("torch and transformers", 400 << 20)


@dataclass(frozen=True)
class Phase:
    """One phase of a run: what it takes in any case, and with a budget for its hidden states (with what is to be done
    where they are too many).
    """

    name: str
    parts: tuple[Part, ...]
    states: Callable[[ActivationBudget], int]
    remedy: str

    def parts_within(self, budget: ActivationBudget) -> tuple[Part, ...]:
        return (*self.parts, Part("hidden states", self.states(budget), self.remedy))

    def nbytes(self, budget: ActivationBudget) -> int:
        return sum(part.nbytes for part in self.parts_within(budget))


@dataclass(frozen=True)
class Estimate:
    """Of a run: its phases, one after the other, and what the host holds all the time, whatever the device.

    On a CPU all of it is the host's; elsewhere the phases are the device's.
    """

    phases: tuple[Phase, ...]
    always: tuple[Part, ...]
    on_host: bool

    def host(self, budget: ActivationBudget = USUAL) -> int:
        work = self.largest(budget).nbytes(budget) if self.on_host else 0
        return sum(part.nbytes for part in self.always) + work

    def device(self, budget: ActivationBudget = USUAL) -> int | None:
        """None on a CPU."""
        return None if self.on_host else self.largest(budget).nbytes(budget)

    def largest(self, budget: ActivationBudget) -> Phase:
        return max(self.phases, key=lambda phase: phase.nbytes(budget))


@dataclass(frozen=True)
class _ModelBytes:
    """Of the largest block, as stored and as computed with; of what lies outside the blocks, and the head among it."""

    stored: int
    block: int
    outside: int
    head: int

    @classmethod
    def of(cls, model: StreamedModel) -> _ModelBytes:
        stored, counts = Counter[int](), Counter[int]()
        outside = head = 0
        for info in model.tensor_map.values():
            if info.block is not None:
                stored[info.block] += info.entry.nbytes
                counts[info.block] += info.entry.count
            elif info.parameter:
                outside += info.entry.count
                head += info.entry.count * (info.role == "output head")
        size = model.dtype.itemsize
        return cls(max(stored.values(), default=0), max(counts.values(), default=0) * size, outside * size, head * size)


def estimate_of(opened: OpenModel, sizes: Sizes, *phases: Phase) -> Estimate:
    """Of a run of `phases` which writes blocks and perhaps evaluates."""
    length, tokens = usual_length(opened), -(-sizes.evaluation // opened.ranks.count)
    batch = min(-(-tokens // length), pick_batch_size(opened.request.batch_size, opened.device, length))
    evaluation = [evaluation_phase(opened.model, tokens, length, batch)] if tokens else []
    written = Part("a block to be written", _ModelBytes.of(opened.model).stored)
    return Estimate((*phases, *evaluation), (LIBRARIES, written), opened.device.type == "cpu")


def pruning_phase(name: str, opened: OpenModel, tokens: int | None, streams: int, layers: LayersSolved) -> Phase:
    """Weights of a block as computed with, its largest layer a few times over, Gram matrices, paused hidden states.

    Of one of the processes, which share the `tokens`.
    """
    if tokens is None:
        return Phase(name, (Part("copies of the largest tensor", 4 * 4 * layers.largest),), lambda _: 0, "")
    sizes = _ModelBytes.of(opened.model)
    of_dense = "leave out --target dense (or a preset that has it), which takes a second model" if streams > 1 else ""
    gram = gram_bytes(layers.widest, streams) if layers.gram else 0
    copies = (4 if gram == 0 else 8) * 4 * layers.largest
    weights = max(streams * (sizes.outside - sizes.head) - copies - gram, streams * sizes.block)
    mine = -(-tokens // opened.ranks.count)
    hidden, inputs = (mine * width * opened.dtype.itemsize for width in (opened.model.hidden_size, layers.widest))
    on_host = opened.device.type == "cpu"

    def states(budget: ActivationBudget) -> int:
        return streams * _paused(hidden, inputs, budget if on_host else None) + (streams - 1) * hidden

    parts = (
        Part("weights of a block" if streams == 1 else "weights of a block of both models", weights, of_dense),
        Part("copies of the largest linear layer", copies),
        Part("Gram matrices", gram, "use a method without them (-m wanda)"),
    )
    return Phase(name, parts, states, "give fewer --samples or a shorter --seq-len")


def _paused(hidden: int, inputs: int, budget: ActivationBudget | None) -> int:
    """What all batches of a model hold at the linear layer where that is most; all in memory without a budget."""
    limit, before = inputs + hidden, hidden
    if budget is not None:
        limit = budget.inputs  # the others wait in files
        before = hidden if budget.states is None else min(hidden, budget.states)
    at_widest = _BESIDE_WIDEST * hidden + min(inputs, limit)
    return _BEFORE_BLOCK * before + max(at_widest, _IN_ATTENTION * hidden + 2 * min(hidden, limit))


def evaluation_phase(model: StreamedModel, tokens: int, length: int, batch: int, models: int = 1) -> Phase:
    """Of windows of `length`, `tokens` in all, so many in a `batch`, through one or two models: hidden states that
    travel together, a block, the head with one batch of logits.
    """
    itemsize, sizes = model.dtype.itemsize, _ModelBytes.of(model)
    state = model.hidden_size * itemsize * STATES_PER_TOKEN
    logits = length * model.vocab_size * (models * batch * itemsize + _FLOATS_OF_A_LOGIT * 4)
    parts = (
        Part("weights of blocks and of what lies outside them", 2 * sizes.block + models * sizes.outside),
        Part("logits of a batch", logits, "give a smaller --batch-size or a shorter --seq-len"),
    )

    def states(budget: ActivationBudget) -> int:
        return models * min(tokens * state, max(batch * length * state, budget.together))

    return Phase("evaluation", parts, states, "give a shorter --seq-len")
