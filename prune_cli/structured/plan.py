"""What becomes of the model, decided before the first byte of the output is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prune_cli.checkpoint.layout import OutputTensor
from prune_cli.report.types import BlockChange, BlockRecovery, ExpertComparison


@dataclass(frozen=True)
class TensorSlice:
    """Of a tensor of the input, only the `entries` along `axis` stay, in this order."""

    axis: int
    entries: Sequence[int]


@dataclass(frozen=True)
class NewNumbers:
    """Of a tensor whose values are experts: those `kept` get new numbers, of others `router` tells what is alike."""

    router: str
    kept: Sequence[int]


@dataclass(frozen=True)
class StructuredPlan:
    """A structured method's decision, whole: the same request comes to the same one.

    `config` is the output's config.json; `tensors` are all tensors of the output by name; `dropped` maps those of the
    input that have no place in it to the reason. `blocks` holds the input's number of every block of the output.
    `units` says how many of the method's units there were and are; `told` is one entry for every block of the input.
    `shapes` are the model's parameters (named as in the input's model) that get another shape, `narrowed` the plain
    attributes of modules that differ because of it; both are for the check against the rebuilt model. `cuts` tell of
    tensors with a shape what they are of their source, where that is all; `shares` tells how much of each kind of unit
    went, where there are several. `tables` are tensors whose values are numbers of experts, `misfits` the extra heads
    that config.json does not describe rightly; `heads` tells what was removed of others. `experts` are those that stay
    in each block; `matched` has the blocks that
    were made to follow the dense ones by -o after=.
    """

    config: dict[str, Any]
    tensors: Mapping[str, OutputTensor]
    dropped: Mapping[str, str]
    blocks: Sequence[int]
    units: tuple[int, int]
    told: Sequence[BlockChange]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    narrowed: frozenset[str] = frozenset()
    slices: Mapping[str, TensorSlice] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, NewNumbers] = field(default_factory=dict)
    misfits: tuple[str, ...] = ()
    heads: Mapping[str, str] = field(default_factory=dict)
    compared: ExpertComparison | None = None
    experts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    matched: tuple[BlockRecovery, ...] = ()
