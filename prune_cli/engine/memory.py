"""How much memory a run takes: measured while it works, and estimated before it."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# A scaled copy, its factor and its inverse.
_SOLVER_MATRICES = 3
_SECONDS_BETWEEN_LOOKS = 0.02
_PAGES, _MEMINFO = Path("/proc/self/statm"), Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Inputs of paused batches beyond this wait in files; it is also from where on holes in the heap are worth avoiding.
LARGE_INPUTS = 1 << 27
# mallopt's parameter, and the size from which glibc then maps each piece by itself.
_M_MMAP_THRESHOLD, _OWN_MAP_BYTES, _BETWEEN_SMALL_BYTES = -3, 1 << 19, 1 << 16
# Up to where glibc raises the threshold by itself, as pieces come and go.
_MOST_IN_HEAP_BYTES = 1 << 25


class PeakMemory:
    """The highest memory seen while this context lasts, by a thread that looks all the time.

    On Linux the host's figure is anonymous memory: mapped checkpoint files are the system's cache, not ours.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.host_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="prune-cli-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            self.host_bytes = max(self.host_bytes, _host_bytes())
            ended = self._ended.wait(_SECONDS_BETWEEN_LOOKS)

    @property
    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None


def device_of_gram(inputs: int, device: torch.device, matrices: int) -> torch.device:
    """Where `matrices` float32 matrices (inputs, inputs) and the solver's own are kept: `device`, else the host."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return device if gram_bytes(inputs, matrices) <= free else torch.device("cpu")


def free_on_host(processes: int = 1) -> int | None:
    """Bytes that this process may come to if it is one of so many that share what is free; None where unknown.

    The least of what the system has and what the cgroup of a container leaves.
    """
    found = [free for free in (_free_in_system(), _free_in_cgroup()) if free is not None]
    return min(found) // processes + _host_bytes() if found else None


def free_on_device(device: torch.device) -> int | None:
    """Bytes that this process may come to on `device`; None where unknown."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _free_in_system() -> int | None:
    if not _MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _free_in_cgroup() -> int | None:
    """Of version 2, as a container sees its own."""
    limit, used, stat = (_CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.exists() or limit.read_text().strip() == "max":
        return None
    cached = next(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file "))
    return max(0, int(limit.read_text()) - int(used.read_text()) + cached)


def gram_bytes(inputs: int, matrices: int) -> int:
    """Of `matrices` float32 matrices (inputs, inputs) and of those that a solver makes beside them."""
    return (matrices + _SOLVER_MATRICES) * 4 * inputs**2


def mmap_large_allocations() -> None:
    """Have glibc map each large piece by itself, so that freeing it returns it: a heap keeps holes between live pieces.

    For the rest of the process; mapping costs time, so it is for runs whose batches fill much memory. Elsewhere than
    with glibc nothing needs to be done.
    """
    _mmap_from(_OWN_MAP_BYTES)


@contextmanager
def no_holes() -> Iterator[None]:
    """While small pieces are made to stay, larger ones that come and go are no neighbours of theirs in the heap."""
    _mmap_from(_BETWEEN_SMALL_BYTES)
    try:
        yield
    finally:
        _mmap_from(_MOST_IN_HEAP_BYTES)


def _mmap_from(nbytes: int) -> None:
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, nbytes)


def _host_bytes() -> int:
    if _PAGES.exists():
        _, resident, shared, *_ = _PAGES.read_text().split()
        return (int(resident) - int(shared)) * resource.getpagesize()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
