"""What a run would do, told by --dry-run before any weight is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from prune_cli.memory import LARGE_INPUTS, gram_bytes
from prune_cli.plan import matrix_shape, pruned_parameters
from prune_cli.prepare import Opened, Prepared, prepare, read_tokens
from prune_cli.report import gain_of_sparse_files, gain_of_zeros
from prune_cli.request import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, PruneRequest, Target
from prune_cli.sparse.estimate import saved_bytes

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
    """Nothing was read but headers; memory is an estimate in bytes, `peak_device_bytes` None on a CPU."""

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
    peak_host_bytes: int
    peak_device_bytes: int | None
    gain: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def dry_run(request: PruneRequest) -> DryRun:
    """Everything `prune` would check before it starts, and what it would then do. Raises what `prune` would raise."""
    job = prepare(request)
    tokens = calibration_tokens(request, job)
    work = _working_memory(job, tokens, request.target)
    on_cpu = job.device.type == "cpu"
    zeros = {name: pruned_parameters(job.decisions[name].place, job.pattern) for name in job.pruned_names()}
    sparse = _sparse_bytes(request, job, zeros)
    largest = max(_block_bytes(job, index, stored=True) for index in range(len(job.model.blocks)))
    return DryRun(
        model=request.model,
        revision=job.source.revision,
        architecture=type(job.model.model).__name__,
        method=str(job.pipeline),
        pattern=str(job.pattern),
        device=str(job.device),
        compute_dtype=str(job.dtype).removeprefix("torch."),
        classes=_classes(job),
        parameters=sum(entry.count for entry in job.checkpoint.entries.values()),
        pruned_parameters=sum(job.checkpoint.entries[name].count for name in job.pruned_names()),
        zeros=sum(zeros.values()),
        bytes_read=job.checkpoint.nbytes * 2,
        bytes_written=job.checkpoint.nbytes
        + sum(job.checkpoint.entries[n].nbytes for n in job.pruned_names())
        + (sparse or 0),
        calibration_tokens=tokens,
        peak_host_bytes=_LIBRARIES + largest + (work if on_cpu else 0),
        peak_device_bytes=None if on_cpu else work,
        gain=gain_of_zeros(str(job.pattern))
        if sparse is None
        else "Estimated: " + gain_of_sparse_files(str(job.pattern), job.checkpoint.nbytes, sparse),
    )


def _sparse_bytes(request: PruneRequest, job: Prepared, zeros: Mapping[str, int]) -> int | None:
    """About what the sparse files will take; None where dense ones are asked for."""
    if request.format != "sparse":
        return None
    pattern = str(job.pattern)
    return job.checkpoint.nbytes - sum(
        saved_bytes(job.checkpoint.entries[name], count, pattern) for name, count in zeros.items()
    )


def calibration_tokens(request: PruneRequest, job: Opened) -> int | None:
    """Samples x length, sampled ones too, of a text as far as it can be told unread; stored tokens are counted."""
    if job.calibration is None:
        return None
    if job.calibration.kind == "tokens":
        stored = job.calibration, job.model, None, "calibration"
        given = read_tokens(*stored, request.samples, request.seq_len, request.seed).ids.numel()
        return given * (1 + request.self_calibration)
    seq_len = request.seq_len or min(DEFAULT_SEQ_LEN, job.model.position_limit or DEFAULT_SEQ_LEN)
    return (request.samples or DEFAULT_SAMPLES) * seq_len * (1 + request.self_calibration)


def _classes(job: Prepared) -> list[ClassOfTensors]:
    tensors: Counter[tuple[str, str, str]] = Counter()
    parameters: Counter[tuple[str, str, str]] = Counter()
    for decision in job.decisions.values():
        key = (decision.place.role, "prune" if decision.prune else "keep", decision.reason)
        tensors[key] += 1
        parameters[key] += decision.place.entry.count
    return [
        ClassOfTensors(role, action, tensors[key], parameters[key], why)
        for key in tensors
        for role, action, why in [key]
    ]


def _working_memory(job: Prepared, tokens: int | None, target: Target) -> int:
    """Weights of a block as computed with, its largest map a few times over, Gram matrices, paused hidden states."""
    itemsize = job.dtype.itemsize
    streams = 2 if target == "dense" else 1
    places = [job.decisions[name].place for name in job.pruned_names()]
    largest_map = max((place.entry.count // place.slices for place in places), default=0)
    if tokens is None:
        return 4 * 4 * largest_map
    block = max(_block_bytes(job, index, stored=False) for index in range(len(job.model.blocks)))
    outside = sum(_outside(job)) * itemsize
    widest = max((matrix_shape(job.decisions[name].place)[1] for name in job.pruned_names()), default=0)
    one, inputs = (tokens * width * itemsize for width in (job.model.hidden_size, widest))
    limit = LARGE_INPUTS if job.device.type == "cpu" else inputs + one  # the others wait in files
    states = max(
        _STATES_BESIDE_WIDEST * one + min(inputs, limit),
        _STATES_IN_ATTENTION * one + 2 * min(one, limit),
    )
    gram = gram_bytes(widest, streams) if "gram" in job.pipeline.needs else 0
    copies = (4 if gram == 0 else 8) * 4 * largest_map
    drift = (streams - 1) * tokens * job.model.hidden_size * itemsize
    return max(streams * outside, streams * block + copies + gram) + streams * states + drift


def _outside(job: Prepared) -> list[int]:
    return [
        place.entry.count
        for place in job.model.places.values()
        if place.block is None and place.parameter and place.role != "output head"
    ]


def _block_bytes(job: Prepared, index: int, *, stored: bool) -> int:
    entries = [job.checkpoint.entries[name] for name in job.model.block_names(index)]
    return sum(entry.nbytes if stored else entry.count * job.dtype.itemsize for entry in entries)
