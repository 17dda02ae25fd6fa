"""Tensors whose values are the numbers of experts: they follow the new numbers, or the run is refused."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch

from prune_cli.errors import RequestError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.structured.block_tables import may_hold_numbers
from prune_cli.structured.plan import NewNumbers

# Of the router's module: for each token the experts that it is sent to.
_TABLES = frozenset({"tid2eid"})


def expert_tables(
    model: StreamedModel, axes: Container[str], kept: Mapping[int | str, Sequence[int]], experts: int
) -> dict[str, NewNumbers]:
    """The tables of experts in the blocks that lose some; `axes` are the parameters with an entry for each expert.

    Raises RequestError where a value is no expert, or where whole numbers may be experts and nothing says so.
    """
    tables: dict[str, NewNumbers] = {}
    routers = {info.module_name: name for name, info in model.tensor_map.items() if _is_router(info, axes)}
    for name, info in model.tensor_map.items():
        if info.parameter is None or info.block is None or info.block not in kept or not may_hold_numbers(info):
            continue
        values = model.checkpoint.read(name)
        inside = bool(((values >= 0) & (values < experts)).all())
        router = routers.get(info.module_name)
        if info.parameter.rpartition(".")[2] in _TABLES and router is not None and values.ndim == 2:
            _check(name, values, experts, inside=inside)
            tables[name] = NewNumbers(router, kept[info.block])
        elif inside and info.parameter not in axes:
            raise RequestError(
                f"{name} holds whole numbers below {experts}, which may be those of experts, and experts get new "
                "numbers: a table that is not known here, so experts of this model cannot be removed."
            )
    return tables


def _is_router(info: TensorInfo, axes: Container[str]) -> bool:
    return info.parameter is not None and info.parameter in axes and len(info.entry.shape) == 2


def _check(name: str, values: torch.Tensor, experts: int, *, inside: bool) -> None:
    if not inside:
        wrong = int(values[(values < 0) | (values >= experts)][0])
        raise RequestError(
            f"{name} sends a token to expert {wrong}, expected 0 to {experts - 1}: the weights and the config do not "
            "belong together."
        )
