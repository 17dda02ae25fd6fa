"""Measures the points that are left: in groups that go side by side, on one device or on several at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from prune_cli.engine.memory import free_on_device, free_on_host
from prune_cli.progress import Progress
from prune_cli.sweeps.concurrent_points import Worker, measure_concurrently
from prune_cli.sweeps.point_run import Measured, SweepTexts
from prune_cli.sweeps.request import Point
from prune_cli.unstructured.prepare import PruningPlan

# More would only delay the journal: what points share is read once for this many.
_MOST_CONCURRENT = 8
_SHARE_OF_FREE_MEMORY = 0.5
# Hidden states that a batch keeps inside a block; between two blocks it is one, and on a CPU that may be in a file.
_STATES_PER_TOKEN = 3
_FREE_WHERE_UNKNOWN = 4 << 30


@dataclass(frozen=True)
class Load:
    """What a point weighs beside others, in bytes, and how many of them go side by side."""

    bytes_of_point: int
    together: int


def load_of(plan: PruningPlan, points: Sequence[Point], tokens: int, workers: int) -> Load:
    """`tokens` are those of calibration and evaluation; `workers` share the memory of a host."""
    on_cpu = plan.device.type == "cpu"
    state, parked = tokens * plan.model.hidden_size * plan.dtype.itemsize, plan.budget.inputs
    weight = min(state, parked) if on_cpu else _STATES_PER_TOKEN * state
    if any(point.request.target == "dense" for point in points):
        # These are in the block at the same time.
        largest = max(_block_bytes(plan, block) for block in range(len(plan.model.blocks)))
        weight = largest + parked + _STATES_PER_TOKEN * state
    most = _concurrent(plan, max(weight, 1), workers if on_cpu else 1)
    fair = -(-len(points) // workers)
    return Load(weight, max(1, min(_MOST_CONCURRENT, most, fair)))


def _concurrent(plan: PruningPlan, weight: int, workers: int) -> int:
    """How many points of `weight` have room: in a share of what is free, or beside a first one within a limit."""
    memory, on_cpu = plan.memory, plan.device.type == "cpu"
    if memory is None:
        free = free_on_host() if on_cpu else free_on_device(plan.device)
        return int((_FREE_WHERE_UNKNOWN if free is None else free) * _SHARE_OF_FREE_MEMORY / workers) // weight
    limit, taken = memory.host_limit or 0, memory.host_estimate
    if not on_cpu:
        limit, taken = memory.device_limit or 0, memory.device_estimate or 0
    return 1 + max(0, limit // workers - taken) // weight


def _block_bytes(plan: PruningPlan, block: int) -> int:
    return sum(plan.checkpoint.entries[name].count for name in plan.model.block_names(block)) * plan.dtype.itemsize


def measure_points(
    points: Sequence[Point],
    plans: Sequence[PruningPlan],
    texts: SweepTexts,
    together: int,
    folder: Path,
    progress: Progress,
) -> Iterator[list[Measured]]:
    """Yields the points of each group when it is done; `plans` has one for each device. Their order changes no result.

    A failure on one device ends the others at their next block and is raised here.
    """
    follow = [point for point in points if point.request.target == "dense"]
    kinds = [[point for point in points if point.request.target != "dense"]]
    # Those that share a dense stream have the same tokens.
    for copies in sorted({point.copies for point in follow}):
        kinds.append([point for point in follow if point.copies == copies])
    groups = [kind[at : at + together] for kind in kinds for at in range(0, len(kind), together)]
    size = max((len(group) for group in groups), default=0)
    workers = [Worker(plan, size + bool(follow)) for plan in plans[: len(groups)]]
    if len(workers) == 1:
        for group in groups:
            yield measure_concurrently(group, workers[0], texts, folder, progress)
    elif workers:
        yield from _in_parallel(groups, workers, texts, folder, progress)


class _EndedError(Exception):
    """Another device has failed, or the user has interrupted."""


def _in_parallel(
    groups: Sequence[Sequence[Point]], workers: Sequence[Worker], texts: SweepTexts, folder: Path, progress: Progress
) -> Iterator[list[Measured]]:
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)
    ended = threading.Event()

    def go_on() -> None:
        if ended.is_set():
            raise _EndedError

    def measure(group: Sequence[Point]) -> list[Measured]:
        worker = idle.get()
        try:
            return measure_concurrently(group, worker, texts, folder, progress, go_on)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(max_workers=len(workers), thread_name_prefix="prune-cli-sweep") as pool:
        left: set[Future[list[Measured]]] = {pool.submit(measure, group) for group in groups}
        try:
            while left:
                done, left = wait(left, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            ended.set()
            pool.shutdown(wait=True, cancel_futures=True)
