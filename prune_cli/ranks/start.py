"""--devices: starts the processes of a run on this machine, as torchrun would: the same code path from there on."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from prune_cli.errors import RequestError
from prune_cli.ranks.environment import process_count

_OPTION = "--devices"
_INTERRUPTED = 130


def start_ranks(devices: str, arguments: Sequence[str]) -> int:
    """Run the command line `arguments` in one process for each of `devices`; returns the exit code for all of them.

    `devices` are numbers of CUDA devices, or cpu as often as there shall be processes. Raises RequestError for others.
    """
    if process_count() > 1:
        raise RequestError(
            f"{_OPTION} starts the processes itself, but something else has started several: leave it out."
        )
    names = [name.strip().removeprefix("cuda:") for name in devices.split(",")]
    on_cpu = set(names) == {"cpu"}
    if not on_cpu:
        _show_only(names, devices)
    threads = max(1, len(os.sched_getaffinity(0)) // len(names))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # One process tells what went wrong, and the launcher need not.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(names),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    command = ["-m", "prune_cli", *_without_devices(arguments), *(["--device", "cpu"] if on_cpu else [])]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode > 0]
        return next(iter(codes), 1)
    except SignalException:
        return _INTERRUPTED
    return 0


def _show_only(names: Sequence[str], devices: str) -> None:
    """Let the processes see these CUDA devices alone, each of which is then one of theirs."""
    count = torch.cuda.device_count()
    if len(set(names)) < len(names) or not all(name.isdecimal() and int(name) < count for name in names):
        raise RequestError(
            f"{_OPTION} is {devices!r}, but must be different numbers of the {count} CUDA devices here, as 0,1, or cpu "
            "once for each process, as cpu,cpu."
        )
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = seen.split(",") if seen else [str(number) for number in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(known[int(name)] for name in names)


def _without_devices(arguments: Sequence[str]) -> list[str]:
    left = list(arguments)
    while _OPTION in left:
        at = left.index(_OPTION)
        del left[at : at + 2]
    return [word for word in left if not word.startswith(f"{_OPTION}=")]
