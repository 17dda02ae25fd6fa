"""The files of a structured output: its own tensors or, packed as the input is, the parts of each weight that stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_cli.checkpoint.config_file import read_config
from prune_cli.checkpoint.layout import Layout, OutputTensor, changed_layout
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.errors import RequestError
from prune_cli.packed.dequantised import Dequantised
from prune_cli.packed.detect import find_packed
from prune_cli.packed.module_lists import check_lists, renumber_modules
from prune_cli.structured.depth.renumber import new_number
from prune_cli.structured.plan import StructuredPlan, TensorSlice
from prune_cli.structured.prepare import PreparedStructure


@dataclass(frozen=True)
class StoredOutput:
    """`tensors` and `cuts` as in Change, of tensors as they lie in the files of `source`; `block` is that of each cut.

    `read_as` makes the model's weights of such files.
    """

    source: Checkpoint
    tensors: Mapping[str, OutputTensor]
    slices: Mapping[str, TensorSlice]
    block: Mapping[str, int | None]
    read_as: Callable[[Checkpoint], Checkpoint]

    @property
    def layout(self) -> Layout:
        return changed_layout(self.source, self.tensors)


def stored_output(prepared: PreparedStructure, change: StructuredPlan) -> StoredOutput:
    """Raises RequestError where the packed form cannot be kept."""
    view = prepared.checkpoint
    blocks = {name: prepared.model.tensor_map[planned.source].block for name, planned in change.tensors.items()}
    if not isinstance(view, Dequantised) or view.half:
        return StoredOutput(view, change.tensors, change.slices, blocks, lambda written: written)
    tensors: dict[str, OutputTensor] = {}
    slices: dict[str, TensorSlice] = {}
    block: dict[str, int | None] = {}
    for name, planned in change.tensors.items():
        cut = change.slices.get(name)
        if planned.source not in view.weights:
            tensors[name], block[name] = planned, blocks[name]
            slices |= {name: cut} if cut is not None else {}
            continue
        for part in _parts(view, planned.source):
            new = _renamed(part, planned.source, name)
            tensors[new], block[new] = OutputTensor(part, _cut_shape(view, part, cut)), blocks[name]
            slices |= {new: cut} if cut is not None else {}
    return StoredOutput(
        view.stored, tensors, slices, block, lambda written: Dequantised(written, find_packed(written, change.config))
    )


def keep_module_lists(
    prepared: PreparedStructure,
    config: dict[str, Any],
    kept: Sequence[int],
    experts: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Give the blocks `kept`, and the `experts` of each, their new numbers in the lists of a packed output's config."""
    if not isinstance(prepared.checkpoint, Dequantised) or prepared.checkpoint.half:
        return

    def new_block(block: int) -> int | None:
        if block >= len(prepared.model.blocks) and prepared.request.drop_extra_heads:
            return None
        return new_number(block, len(prepared.model.blocks), kept)

    def new_expert(block: int, expert: int) -> int | None:
        stay = None if experts is None else experts.get(block)
        if stay is None:
            return expert
        return list(stay).index(expert) if expert in stay else None

    renumber_modules(config, prepared.model.blocks_name.rpartition(".")[2], new_block, new_expert)


def check_module_lists(prepared: PreparedStructure, change: StructuredPlan) -> None:
    """Raise RequestError where a list of modules in the output's config would speak of others than the input's."""
    if isinstance(prepared.checkpoint, Dequantised) and not prepared.checkpoint.half:
        modules = {
            planned.source.rpartition(".")[0]: name.rpartition(".")[0] for name, planned in change.tensors.items()
        }
        check_lists(copy.deepcopy(read_config(prepared.source.folder)), change.config, modules)


def _parts(view: Dequantised, name: str) -> tuple[str, ...]:
    weight = view.weights[name]
    return (*weight.parts.values(), *weight.beside)


def _renamed(part: str, old: str, new: str) -> str:
    """The name of a part of the weight `old` once that is called `new`: they share the module's name."""
    module = old.rpartition(".")[0]
    return new.rpartition(".")[0] + part.removeprefix(module)


def _cut_shape(view: Dequantised, part: str, cut: TensorSlice | None) -> tuple[int, ...] | None:
    """Of a part with one matrix for every expert; None for a part that is copied."""
    if cut is None:
        return None
    if cut.axis != 0:
        raise RequestError(f"{part} is packed and can only lose whole experts: use --packed bf16.")
    return (len(cut.entries), *view.stored.entries[part].shape[1:])
