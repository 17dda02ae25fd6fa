"""Files are worked on two at a time, so that the processors have work while one waits for the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from threading import Event, Lock

from prune_cli.progress import Progress
from prune_cli.sparse.encode_shard import Written

FILES_AT_A_TIME = 2
_MOST_THREADS = 8

# Writes one file: its name, the threads for its tensors, and what to call after each of them.
Work = Callable[[str, Executor, Callable[[], None]], Written]


class _StoppedError(Exception):
    """Another file failed or the run was interrupted."""


def each_file(files: Sequence[str], work: Work, progress: Progress) -> Iterator[tuple[str, Written]]:
    """What `work` says of every file, as they are done. An error in one ends the other too, at its next tensor."""
    stopped, one = Event(), Lock()

    def done() -> None:
        if stopped.is_set():
            raise _StoppedError
        with one:
            progress.advance()

    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    with ThreadPoolExecutor(threads) as tensors, ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        jobs = {pool.submit(work, file, tensors, done): file for file in files}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            stopped.set()
            for job in jobs:
                job.cancel()
