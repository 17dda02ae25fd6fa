"""The mixtures of experts of a model: how many experts, which of them a token can be sent to, and what names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prune_cli.checkpoint.layout import OutputTensor
from prune_cli.errors import RequestError
from prune_cli.model.architecture import setting
from prune_cli.model.moe import identities
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.structured.config import text_config
from prune_cli.structured.plan import TensorSlice

_NUMBER = re.compile(r"(\.experts?\.)(\d+)(\.)")
_NO_COUNT = ("per_tok", "per_token", "shared", "top", "null", "zero", "group", "size")


@dataclass(frozen=True)
class Mixture:
    """The experts of one block: `module` computes them, `tensor` is one of their tensors.

    A token is sent to `top_k` of them, which lie in `open_groups` of `groups` runs of the same length. Some of these
    may be of the `identities`, numbered after them, which return what they get and always stay.
    """

    block: int
    module: str
    tensor: str
    experts: int
    top_k: int
    groups: int
    open_groups: int
    identities: int = 0

    def fewest(self) -> int:
        """How many experts must stay, so that every token still finds as many as it is sent to."""
        if self.groups == 1:
            return max(1, self.top_k - self.identities)
        # Such routers rank groups by their two best experts.
        return self.groups * max(2, -(-self.top_k // self.open_groups))


def find_mixtures(model: StreamedModel) -> list[Mixture]:
    """Raises RequestError where there are none, or none that are computed in a way known here, or of several sizes."""
    found: dict[str, Mixture] = {}
    for name, info in model.tensor_map.items():
        if info.role == "attention expert":
            raise RequestError(
                f"Experts of {type(model.model).__name__} cannot be removed: config.json counts them together with the "
                "experts of attention, which stay; use --method width or depth."
            )
        if info.role == "expert" and info.expert is None:
            raise RequestError(f"{name}: {info.reason}, so experts of this architecture cannot be removed.")
        part = info.expert
        if part is not None and info.block is not None and part.module not in found:
            found[part.module] = _mixture(model, name, info.block, part.module, part.experts)
    if not found:
        raise RequestError(f"{type(model.model).__name__} has no experts: use --method width or depth.")
    mixtures = sorted(found.values(), key=lambda mixture: mixture.block)
    sizes = sorted({mixture.experts for mixture in mixtures})
    if len(sizes) > 1 or len({mixture.block for mixture in mixtures}) != len(mixtures):
        raise RequestError(f"The mixtures of this model have {sizes} experts: only those of one size are supported.")
    return mixtures


def _mixture(model: StreamedModel, tensor: str, block: int, module: str, experts: int) -> Mixture:
    parent = model.model.get_submodule(module.rpartition(".")[0])
    top_k = _attribute(parent, ("top_k", "num_experts_per_tok"))
    if top_k is None:
        top_k = setting(model.config.get_text_config(), "num_experts_per_tok")
    if not isinstance(top_k, int):
        raise RequestError(
            f"Neither config.json nor {module.rpartition('.')[0]} says to how many of its {experts} experts a token is "
            "sent: correct config.json (num_experts_per_tok)."
        )
    groups = _attribute(parent, ("num_group", "n_group")) or 1
    open_groups = _attribute(parent, ("topk_group",)) or groups
    beside = identities(model.model.get_submodule(module))
    return Mixture(block, module, tensor, experts, top_k, groups, open_groups, beside)


def _attribute(parent: nn.Module, names: Sequence[str]) -> int | None:
    """What the mixture or its router says under one of `names`."""
    for module in parent.modules():
        for name in names:
            value = getattr(module, name, None)
            if type(value) is int:
                return value
    return None


def config_with_experts(raw: dict[str, Any], config: Any, experts: int, keep: int) -> None:
    """Change `raw`, a config.json, where it counts all experts."""
    text, part = text_config(raw, config)
    if not _count_in(part, text.to_dict(), experts, keep):
        raise RequestError(f"config.json has no entry that counts the {experts} experts: not supported.")


def _count_in(part: dict[str, Any], whole: Mapping[str, Any], experts: int, keep: int) -> bool:
    """Change `part`, which may lack entries of the `whole`; whether there was a count (DBRX: an object deeper)."""
    found = False
    for key, value in whole.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, Mapping) and isinstance(part.get(key), dict):
            found |= _count_in(part[key], value, experts, keep)
        elif "expert" in key and type(value) is int and value == experts and not any(word in key for word in _NO_COUNT):
            part[key], found = keep, True
    return found


@dataclass(frozen=True)
class ExpertAxis:
    """Along `axis` a parameter has `run` entries for each expert, and as many for each of the identities behind them.

    It has none for those where `identities` is 0.
    """

    axis: int
    run: int
    identities: int

    def entries(self, kept: Sequence[int], experts: int) -> list[int]:
        """Those that stay with the experts `kept` of all."""
        each = [*kept, *range(experts, experts + self.identities)]
        return [self.run * expert + at for expert in each for at in range(self.run)]


def changed_shapes(model: StreamedModel, smaller: nn.Module, mixture: Mixture, keep: int) -> dict[str, ExpertAxis]:
    """Parameters of the blocks with entries for each expert of mixtures like `mixture`; `smaller` has `keep` of them.

    Raises RequestError where something else differs.
    """
    there = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}
    axes: dict[str, ExpertAxis] = {}
    for name, tensor in model.model.state_dict().items():
        shape = tuple(tensor.shape)
        if there.get(name) == shape:
            continue
        found = _expert_axis(shape, there.get(name, ()), mixture, keep)
        if found is None or not name.startswith(model.blocks_name + "."):
            raise RequestError(
                f"With {keep} of {mixture.experts} experts {name} would go from the shape {list(shape)} to "
                f"{list(there.get(name, ()))}, no whole number of entries for each: experts of this architecture "
                "cannot be removed."
            )
        axes[name] = found
    return axes


def _expert_axis(shape: Sequence[int], there: Sequence[int], mixture: Mixture, keep: int) -> ExpertAxis | None:
    axes = [axis for axis, (a, b) in enumerate(zip(shape, there, strict=False)) if a != b]
    if len(there) != len(shape) or len(axes) != 1:
        return None
    axis, experts = axes[0], mixture.experts
    for beside in dict.fromkeys((mixture.identities, 0)):
        run, rest = divmod(shape[axis], experts + beside)
        if rest == 0 and there[axis] == run * (keep + beside):
            return ExpertAxis(axis, run, beside)
    return None


def without_experts(
    model: StreamedModel,
    axes: Mapping[str, ExpertAxis],
    mixture: Mixture,
    kept: Mapping[int | str, Sequence[int]],
    left_out: Mapping[str, str],
) -> tuple[dict[str, OutputTensor], dict[str, str], dict[str, TensorSlice]]:
    """All tensors of an output with the experts `kept` of each block or extra head, renumbered; why others go; cuts.

    Mixtures are like `mixture`. What is `left_out` goes too, with the reason.
    """
    tensors: dict[str, OutputTensor] = {}
    dropped = dict(left_out)
    slices: dict[str, TensorSlice] = {}
    for name, info in model.tensor_map.items():
        if name in dropped:
            continue
        experts = kept.get(_mixture_of(info))
        known = info if info.twin is None else model.tensor_map[info.twin]
        if experts is None or (known.parameter not in axes and not _is_of_one_expert(info)):
            tensors[name] = OutputTensor(name)
        elif known.parameter is not None and known.entry.shape == model.shape_of(known.parameter):
            axis = axes[known.parameter]
            entries = axis.entries(experts, mixture.experts)
            shape = tuple(len(entries) if at == axis.axis else size for at, size in enumerate(info.entry.shape))
            tensors[name] = OutputTensor(name, shape)
            slices[name] = TensorSlice(axis.axis, entries)
        else:
            expert, stay = _expert_of(name), [*experts, *range(mixture.experts, mixture.experts + mixture.identities)]
            if expert in stay:
                number = stay.index(expert)
                tensors[_NUMBER.sub(rf"\g<1>{number}\g<3>", name, count=1)] = OutputTensor(name)
            else:
                dropped[name] = f"expert {expert} was removed"
    return tensors, dropped, slices


def _mixture_of(info: TensorInfo) -> int | str:
    """By what `kept` has the experts of a tensor: its extra head, its block, or -1 for neither."""
    layer = info.block if info.block is not None else info.layer
    return info.head or (-1 if layer is None else layer)


def _is_of_one_expert(info: TensorInfo) -> bool:
    """Of a tensor that the model has not: whether its name numbers an expert."""
    return info.parameter is None and _NUMBER.search(info.entry.name) is not None


def _expert_of(name: str) -> int:
    found = _NUMBER.search(name)
    if found is None:
        raise RequestError(f"{name} is a tensor of one expert, but its name does not say of which: not supported.")
    return int(found[2])
