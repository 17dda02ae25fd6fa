"""Measures the points that are left: in groups that go side by side, on one device or on several at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from prune_cli.engine.memory import LARGE_INPUTS
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Progress
from prune_cli.sweep.concurrent_points import measure_concurrently
from prune_cli.sweep.point_run import Measured, Texts
from prune_cli.sweep.request import Point
from prune_cli.unstructured.prepare import PruningPlan

# More would only delay the journal: what points share is read once for this many.
_MOST_CONCURRENT = 8
_SHARE_OF_FREE_MEMORY = 0.5
# Hidden states that a batch keeps inside a block; between two blocks it is one, and on a CPU that may be in a file.
_STATES_PER_TOKEN = 3
_MEMINFO = Path("/proc/meminfo")
_FREE_WHERE_UNKNOWN = 4 << 30


@dataclass(frozen=True)
class Load:
    """What a point weighs beside others, in bytes, and how many of them go side by side."""

    bytes_of_point: int
    together: int


def load_of(job: PruningPlan, points: Sequence[Point], tokens: int, workers: int) -> Load:
    """`tokens` are those of calibration and evaluation; `workers` share the memory of a host."""
    on_cpu = job.device.type == "cpu"
    state = tokens * job.model.hidden_size * job.dtype.itemsize
    weight = min(state, LARGE_INPUTS) if on_cpu else _STATES_PER_TOKEN * state
    if any(point.request.target == "dense" for point in points):
        # These are in the block at the same time.
        largest = max(_block_bytes(job, block) for block in range(len(job.model.blocks)))
        weight = largest + LARGE_INPUTS + _STATES_PER_TOKEN * state
    room = int(_free(job.device) * _SHARE_OF_FREE_MEMORY / (workers if on_cpu else 1))
    fair = -(-len(points) // workers)
    return Load(weight, max(1, min(_MOST_CONCURRENT, room // max(weight, 1), fair)))


def _block_bytes(job: PruningPlan, block: int) -> int:
    return sum(job.checkpoint.entries[name].count for name in job.model.block_names(block)) * job.dtype.itemsize


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _FREE_WHERE_UNKNOWN


class _Worker:
    """A device with the models that points go through: made once, their weights come and go."""

    def __init__(self, job: PruningPlan, models: int) -> None:
        self.job = job
        checkpoint = job.checkpoint.reopened()
        self.models: list[StreamedModel] = [job.with_checkpoint(checkpoint) for _ in range(models)]


def measure_points(
    points: Sequence[Point], jobs: Sequence[PruningPlan], texts: Texts, together: int, folder: Path, progress: Progress
) -> Iterator[list[Measured]]:
    """Yields the points of each group when it is done; `jobs` has one for each device. Their order changes no result.

    A failure on one device ends the others at their next block and is raised here.
    """
    follow = [point for point in points if point.request.target == "dense"]
    kinds = [[point for point in points if point.request.target != "dense"]]
    # Those that share a dense stream have the same tokens.
    for copies in sorted({point.request.self_calibration for point in follow}):
        kinds.append([point for point in follow if point.request.self_calibration == copies])
    groups = [kind[at : at + together] for kind in kinds for at in range(0, len(kind), together)]
    size = max((len(group) for group in groups), default=0)
    workers = [_Worker(job, size + bool(follow)) for job in jobs[: len(groups)]]
    if len(workers) == 1:
        for group in groups:
            yield measure_concurrently(group, workers[0].job, workers[0].models, texts, folder, progress)
    elif workers:
        yield from _in_parallel(groups, workers, texts, folder, progress)


class _EndedError(Exception):
    """Another device has failed, or the user has interrupted."""


def _in_parallel(
    groups: Sequence[Sequence[Point]], workers: Sequence[_Worker], texts: Texts, folder: Path, progress: Progress
) -> Iterator[list[Measured]]:
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)
    ended = threading.Event()

    def go_on() -> None:
        if ended.is_set():
            raise _EndedError

    def measure(group: Sequence[Point]) -> list[Measured]:
        worker = idle.get()
        try:
            return measure_concurrently(group, worker.job, worker.models, texts, folder, progress, go_on)
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
