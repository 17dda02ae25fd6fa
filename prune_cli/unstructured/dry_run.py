"""What a run would do, told by --dry-run before any weight is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from prune_cli.engine.eval_windows import evaluation_memory
from prune_cli.engine.memory import LARGE_INPUTS, gram_bytes
from prune_cli.engine.open_model import given_tokens
from prune_cli.model.orientation import matrix_shape
from prune_cli.packed.output import describe, output_bytes
from prune_cli.report.gains import gain_of_sparse_files, gain_of_zeros
from prune_cli.report.types import NotLoaded
from prune_cli.request.request import PruneRequest
from prune_cli.sparse.saved_bytes import saved_bytes
from prune_cli.unstructured.build_report import what_is_not_loaded
from prune_cli.unstructured.plan import n_of_m, pruned_parameters
from prune_cli.unstructured.prepare import PruningPlan, prepare

# torch, transformers and their tables; measured as anonymous memory after importing them.
_LIBRARIES = 400 << 20
# Paused forward passes keep the embeddings, the block's input and the residual between; in attention, instead of the
# last, queries, keys and values.
_STATES_BESIDE_WIDEST, _STATES_IN_ATTENTION = 3, 5


@dataclass(frozen=True)
class ClassOfTensors:
    """Tensors that share a role and a fate."""

    role: str
    action: str
    tensors: int
    parameters: int
    reason: str


@dataclass(frozen=True)
class DryRun:
    """Nothing was read but headers; `bytes_written` are those of the output's weights.

    Of the `calibration_tokens`, the dense model would sample `sampled_tokens`.

    Memory is an estimate in bytes, evaluation included; `peak_device_bytes` is None on a CPU.
    """

    model: str
    revision: str | None
    architecture: str
    method: str
    pattern: str
    device: str
    compute_dtype: str
    classes: Sequence[ClassOfTensors]
    parameters: int
    pruned_parameters: int
    zeros: int
    bytes_read: int
    bytes_written: int
    calibration_tokens: int | None
    sampled_tokens: int
    peak_host_bytes: int
    peak_device_bytes: int | None
    gain: str
    packed: str | None
    not_loaded: tuple[NotLoaded, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def dry_run(request: PruneRequest) -> DryRun:
    """Everything `prune` would check before it starts, and what it would then do. Raises what `prune` would raise."""
    plan = prepare(request)
    given = given_tokens(plan)
    sampled = 0 if given is None else given * plan.copies(given)
    tokens = None if given is None else given + sampled
    work = max(_working_memory(plan, tokens), evaluation_memory(plan, given))
    on_cpu = plan.device.type == "cpu"
    zeros = {name: pruned_parameters(plan.decisions[name].info, plan.pattern) for name in plan.pruned_names()}
    sparse = _sparse_bytes(plan, zeros)
    largest = max(_block_bytes(plan, index, stored=True) for index in range(len(plan.model.blocks)))
    return DryRun(
        model=request.model,
        revision=plan.source.revision,
        architecture=type(plan.model.model).__name__,
        method=str(plan.pipeline),
        pattern=str(plan.pattern),
        device=str(plan.device),
        compute_dtype=str(plan.dtype).removeprefix("torch."),
        classes=_classes(plan),
        parameters=sum(entry.count for entry in plan.checkpoint.entries.values()),
        pruned_parameters=sum(plan.checkpoint.entries[name].count for name in plan.pruned_names()),
        zeros=sum(zeros.values()),
        bytes_read=plan.checkpoint.nbytes * 2,
        bytes_written=output_bytes(plan.checkpoint) if sparse is None else sparse,
        calibration_tokens=tokens,
        sampled_tokens=sampled,
        peak_host_bytes=_LIBRARIES + largest + (work if on_cpu else 0),
        peak_device_bytes=None if on_cpu else work,
        gain=gain_of_zeros(n_of_m(plan.pattern))
        if sparse is None
        else "Estimated: " + gain_of_sparse_files(n_of_m(plan.pattern), output_bytes(plan.checkpoint), sparse),
        packed=describe(plan.checkpoint),
        not_loaded=what_is_not_loaded(plan),
    )


def _sparse_bytes(plan: PruningPlan, zeros: Mapping[str, int]) -> int | None:
    """About what the sparse files will take; None where dense ones are asked for."""
    if plan.request.format != "sparse":
        return None
    pattern = n_of_m(plan.pattern)
    return output_bytes(plan.checkpoint) - sum(
        saved_bytes(plan.checkpoint.entries[name], count, pattern) for name, count in zeros.items()
    )


def _classes(plan: PruningPlan) -> list[ClassOfTensors]:
    tensors: Counter[tuple[str, str, str]] = Counter()
    parameters: Counter[tuple[str, str, str]] = Counter()
    for decision in plan.decisions.values():
        key = (decision.info.role, "prune" if decision.prune else "keep", decision.reason)
        tensors[key] += 1
        parameters[key] += decision.info.entry.count
    return [
        ClassOfTensors(role, action, tensors[key], parameters[key], why)
        for key in tensors
        for role, action, why in [key]
    ]


def _working_memory(plan: PruningPlan, tokens: int | None) -> int:
    """Weights of a block as computed with, its largest layer a few times over, Gram matrices, paused hidden states."""
    itemsize = plan.dtype.itemsize
    streams = 2 if plan.request.target == "dense" else 1
    infos = [plan.decisions[name].info for name in plan.pruned_names()]
    largest_layer = max((info.entry.count // info.slices for info in infos), default=0)
    if tokens is None:
        return 4 * 4 * largest_layer
    block = max(_block_bytes(plan, index, stored=False) for index in range(len(plan.model.blocks)))
    outside = sum(_outside(plan)) * itemsize
    widest = max((matrix_shape(plan.decisions[name].info)[1] for name in plan.pruned_names()), default=0)
    one, inputs = (tokens * width * itemsize for width in (plan.model.hidden_size, widest))
    limit = LARGE_INPUTS if plan.device.type == "cpu" else inputs + one  # the others wait in files
    states = max(
        _STATES_BESIDE_WIDEST * one + min(inputs, limit),
        _STATES_IN_ATTENTION * one + 2 * min(one, limit),
    )
    gram = gram_bytes(widest, streams) if "gram" in plan.pipeline.needs else 0
    copies = (4 if gram == 0 else 8) * 4 * largest_layer
    drift = (streams - 1) * tokens * plan.model.hidden_size * itemsize
    return max(streams * outside, streams * block + copies + gram) + streams * states + drift


def _outside(plan: PruningPlan) -> list[int]:
    return [
        info.entry.count
        for info in plan.model.tensor_map.values()
        if info.block is None and info.parameter and info.role != "output head"
    ]


def _block_bytes(plan: PruningPlan, index: int, *, stored: bool) -> int:
    entries = [plan.checkpoint.entries[name] for name in plan.model.block_names(index)]
    return sum(entry.nbytes if stored else entry.count * plan.dtype.itemsize for entry in entries)
