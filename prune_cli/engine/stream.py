"""A model and the batches on their way through it: the weights come and go block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from calibration.batch import Batch
from prune_cli.checkpoint.block_tensors import BlockTensors
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.activation_offload import ActivationOffload
from prune_cli.engine.input_groups import InputGroups
from prune_cli.engine.lockstep import BlockOverride, Lockstep, Observe
from prune_cli.engine.memory import LARGE_INPUTS, mmap_large_allocations
from prune_cli.engine.waiting_batches import Call
from prune_cli.model.moe import entrance
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.ranks.ranks import ALONE, Ranks


class Stream:
    """A context in which `batches` stand between two blocks of `model`, then in the next.

    On entering they wait before the first block. For every block in order: `load`, one of `through`, `stops` or
    `rehearse` and `through`, `unload`; then `finish` for what the model returns, or `stop_at_head`.

    Where several `ranks` are said, each conducts its share of `batches`, here the attribute, before which there are
    `tokens_before` in those of other ranks; all of them pause at the same layers.
    """

    def __init__(
        self,
        model: StreamedModel,
        batches: Sequence[Batch],
        parking: ActivationOffload | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.batches = ranks.share(batches)
        self.groups = InputGroups(model)
        self.tokens_before = sum(batch.tokens for batch in ranks.before(batches))
        self._lockstep = Lockstep(model.forward, model.blocks, self.batches, parking, ranks.earliest)
        self._state_bytes = sum(batch.ids.numel() for batch in self.batches) * model.hidden_size * model.dtype.itemsize

    def __enter__(self) -> Stream:
        if self.model.device.type == "cpu" and self._state_bytes > LARGE_INPUTS:
            mmap_large_allocations()
        self.model.load_outside()
        self._lockstep.__enter__()
        self._lockstep.start()
        self.model.unload_embeddings()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._lockstep.__exit__(kind, value, trace)
        self.model.unload_embeddings()

    def load(self, block: int, checkpoint: Checkpoint | None = None) -> BlockTensors:
        """Load a block from `checkpoint` (the model's own by default); returns its tensors as stored."""
        tensors = self.model.load_block(block, checkpoint or self.model.checkpoint)
        self.model.read_ahead(block + 1)
        return tensors

    def unload(self, block: int) -> None:
        self.model.unload_block(block)

    def run_block(self, block: int, instead: BlockOverride | None = None) -> None:
        """Every batch passes `block`; `instead` is called for each in place of the block's forward."""
        self._lockstep.run_block(block, instead)

    def pause_at(
        self, block: int, names: Sequence[str], *, again: bool = False
    ) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Stop at the layers of the tensors `names`, in the order of the forward: the name and one input per batch.

        At the experts of a block all batches stop once, and the name is that of their module. If they shall pass
        `again`, all wait before the block afterwards.
        """
        return self._lockstep.pause_at(block, self._modules(names), again=again)

    def arguments(self) -> list[list[torch.Tensor]]:
        """At a stop, all tensors that each of its batches brings, the input first."""
        return self._lockstep.arguments()

    def shares_inputs(self) -> bool:
        """At a stop, whether all batches bring what they brought to the stop before."""
        return self._lockstep.shares_inputs()

    def here(self) -> list[Batch]:
        """The batches that wait at a stop, in the order of the inputs there."""
        return [self.batches[number] for number in self._lockstep.here()]

    def passing(self) -> Batch:
        """The batch that runs now, for hooks."""
        return self.batches[self._lockstep.current()]

    def observe_block(self, block: int, names: Sequence[str], observe: Observe) -> None:
        """Pass `block` once for `observe` alone; names and order as in `stops`."""
        self._lockstep.observe_block(block, self._modules(names), observe)

    def waiting(self) -> list[torch.Tensor | None]:
        """What each batch waits with: before a block, its hidden states."""
        return self._lockstep.waiting()

    def calls(self) -> list[Call]:
        """Before a block, how each batch is about to call it; from outside, it may be called as often as one likes."""
        return self._lockstep.calls()

    def current(self) -> int:
        """The number of the batch that runs now, for hooks."""
        return self._lockstep.current()

    def probe(self, block: int) -> tuple[torch.Tensor | None, Any]:
        """Run the first batch through `block` for hooks to look at; returns what goes in and what comes out."""
        return self._lockstep.probe(block)

    def stop_at_head(self, name: str) -> list[torch.Tensor]:
        """Go on from the last block to the linear layer of the tensor `name`; returns its inputs, one per batch."""
        return self._lockstep.stop_after_blocks(self.module(name))

    def last_states(self) -> list[torch.Tensor]:
        """Go on from the last block; returns what each batch brings to the output head, whatever that computes with."""
        head = self.model.model.get_output_embeddings()
        assert head is not None, "a causal language model has an output head"
        return self._lockstep.stop_after_blocks(head)

    def finish(self) -> Iterator[Any]:
        return self._lockstep.finish()

    def _modules(self, names: Sequence[str]) -> dict[nn.Module, str]:
        infos = self.model.tensor_map
        return {self.module(name): at.module if (at := infos[name].expert) else name for name in names}

    def module(self, name: str) -> nn.Module:
        """Where the batches stop for the tensor `name`."""
        module = self.model.module_of(name)
        return module if self.model.tensor_map[name].expert is None else entrance(module)
