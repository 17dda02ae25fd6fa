"""What comes to the experts of an extra head: the head run on the calibration text, behind the dense model.

A head for multi-token prediction joins a token's last hidden states with the embedding of the next token, and goes on
with a block like the model's. Here it takes that block's place while all others hand on what comes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibration.batch import Batch
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.expert_inputs import at_experts
from prune_cli.engine.lockstep import tensors_in
from prune_cli.engine.open_model import OpenModel
from prune_cli.engine.stream import Stream
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.structured.extra_heads import by_head
from prune_cli.structured.moe.expert_statistics import ExpertSums, sums_at
from prune_cli.structured.moe.mixtures import Mixture

# The matrix that joins (embeddings first), and the norms before it: of the embeddings, of the hidden states.
_JOINS = (
    ("eh_proj.weight", "enorm.weight", "hnorm.weight"),
    ("fc.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight"),
)


@dataclass(frozen=True)
class HeadMixture:
    """The mixture of an extra head that is known how to run: `like` is that of the block it is shaped as.

    `names` are the head's tensors by the names of that block's; the last three are tensors of the join before it.
    """

    head: str
    like: Mixture
    names: Mapping[str, str]
    join: str
    norm_embeddings: str
    norm_states: str


def find_head_mixtures(model: StreamedModel, mixtures: Sequence[Mixture]) -> list[HeadMixture]:
    """The model's only extra head, where it is one block shaped as a block with experts behind a join known here."""
    heads = by_head(model.tensor_map)
    found = [_head_mixture(model, mixtures, head, names) for head, names in heads.items()]
    return [each for each in found if each is not None] if len(heads) == 1 else []


def _head_mixture(
    model: StreamedModel, mixtures: Sequence[Mixture], head: str, names: Sequence[str]
) -> HeadMixture | None:
    infos = model.tensor_map
    twins = {twin: name for name in names if (twin := infos[name].twin) is not None}
    like = next((each for each in mixtures if set(model.block_names(each.block)) == twins.keys()), None)
    if like is None or like.block == 0 or any(infos[t].entry.shape != infos[n].entry.shape for t, n in twins.items()):
        return None
    others = [name for name in names if infos[name].twin is None]
    for parts in _JOINS:
        join, *norms = (next((name for name in others if name.endswith(f".{part}")), None) for part in parts)
        if join and all(norms) and infos[join].entry.shape == (model.hidden_size, 2 * model.hidden_size):
            return HeadMixture(head, like, twins, join, *norms)  # pyright: ignore[reportArgumentType]
    return None


class _InPlaceOfBlock(Checkpoint):
    """`source`, with the tensors of a head under the names of the block whose place it takes."""

    def __init__(self, source: Checkpoint, names: Mapping[str, str]) -> None:
        super().__init__(source.folder, source.entries, source.files, source.index)
        self._source, self._names = source, names

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._names.get(name, name))

    def read_ahead(self, names: Iterator[str]) -> None:
        self._source.read_ahead(self._names.get(name, name) for name in names)


def gather_head(
    opened: OpenModel,
    head: HeadMixture,
    states: Sequence[torch.Tensor],
    batches: Sequence[Batch],
    progress: Progress,
) -> ExpertSums:
    """The sums over what comes to the head's experts from all of `batches`.

    `states` (samples, length, hidden) are the model's last ones, of this rank's share of them.
    """
    model, block = opened.model, head.like.block
    progress.stage(f"Measuring the experts of {head.head}", 1)
    join = _join(opened, head, [each[:, :-1] for each in states])
    sums = ExpertSums.of(head.like.experts)
    with Stream(model, [_next_tokens(batch) for batch in batches], ranks=opened.ranks) as stream:
        for before in range(block):
            hand_on = _HandOn(stream, join if before == 0 else None)
            stream.run_block(before, hand_on)
        stream.load(block, _InPlaceOfBlock(model.checkpoint, head.names))
        for module, _ in stream.pause_at(block, [head.like.tensor]):
            sums.merge(sums_at(at_experts(stream, module), head.like.experts))
        stream.unload(block)
    progress.advance()
    return sums


def _next_tokens(batch: Batch) -> Batch:
    mask = None if batch.mask is None else batch.mask[:, 1:] & batch.mask[:, :-1]
    return Batch(batch.ids[:, 1:], mask)


@dataclass(frozen=True)
class _HandOn:
    """In place of a block: what comes to it goes on; of the first, joined with the states of the batch."""

    stream: Stream
    join: Callable[[int, torch.Tensor], torch.Tensor] | None

    def __call__(self, _: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        hidden = tensors_in(args, kwargs)[0]
        return hidden if self.join is None else self.join(self.stream.current(), hidden)


def _join(
    opened: OpenModel, head: HeadMixture, states: Sequence[torch.Tensor]
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Of the number of a batch and its embeddings (samples, length, hidden): what comes to the head's block."""
    model = opened.model
    norm = next(module for module in model.blocks[head.like.block].modules() if _is_norm(module, model.hidden_size))
    weights = {
        name: model.checkpoint.read(name).to(model.device, model.dtype)
        for name in (head.join, head.norm_embeddings, head.norm_states)
    }

    def normed(name: str, values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weights[name]}, (values,))

    def join(number: int, embeddings: torch.Tensor) -> torch.Tensor:
        before = states[number].to(embeddings.device, embeddings.dtype)
        both = [normed(head.norm_embeddings, embeddings), normed(head.norm_states, before)]
        return nn.functional.linear(torch.cat(both, dim=-1), weights[head.join])

    return join


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and tuple(weight.shape) == (width,)
