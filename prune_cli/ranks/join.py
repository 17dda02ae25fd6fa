"""Makes a run of several processes out of this one and those that torchrun, or the like, has started beside it."""

from __future__ import annotations

import ctypes
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from prune_cli.errors import PruneError, RequestError
from prune_cli.ranks.channel import Channel
from prune_cli.ranks.environment import SILENCE_SECONDS, local_rank, process_count
from prune_cli.ranks.life_signs import LifeSigns, Place
from prune_cli.ranks.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from accelerate import PartialState

# Torch's own limit would end a run that waits for a solver; life signs tell whether there is somebody to wait for.
_NO_LIMIT = timedelta(days=100)
_TO_MEET = timedelta(minutes=5)


@contextmanager
def joined(device: str, silence: float = SILENCE_SECONDS) -> Iterator[Ranks]:
    """All processes of this run, each with a device of its own where --device is auto; alone where there is but one.

    An error inside ends all of them: it is raised where it was first, and elsewhere EndedElsewhereError. Raises
    RequestError where there are fewer devices than processes.
    """
    if process_count() == 1:
        yield ALONE
        return
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if not on_cpu:
        _check_devices(device)
    state = _begin(on_cpu=on_cpu)
    count, rank = state.num_processes, state.process_index
    own_store = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore("prune-cli", own_store)  # pyright: ignore[reportPrivateImportUsage]
    host = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
    signs = LifeSigns(store, rank, count, silence)
    channel = Channel(host, count, signs)
    try:
        with signs:
            try:
                yield _ranks(channel, rank, count)
            except BaseException as error:
                raised = signs.tell(error)
                if raised is error:
                    raise
                raise raised from error
    finally:
        _end(state, host, given_up=channel.pending)


def _begin(*, on_cpu: bool) -> PartialState:
    from accelerate import PartialState

    try:
        with warnings.catch_warnings():
            # It tells of threads that it shares out between processes, which is as it should be.
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
            state = PartialState(cpu=on_cpu, timeout=_TO_MEET)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise PruneError(
            f"The {process_count()} processes did not find each other ({' '.join(str(error).split())}): start them "
            "with torchrun or accelerate launch."
        ) from error
    if state.num_processes != process_count():
        raise PruneError(
            f"The environment says {process_count()} processes and accelerate found {state.num_processes}: start them "
            "with torchrun or accelerate launch."
        )
    return state


def _ranks(channel: Channel, rank: int, count: int) -> Ranks:
    places = Ranks(rank, count, channel=channel).gathered(Place.here())
    channel.life_signs.met(places)
    return Ranks(rank, count, len({place.host for place in places}), channel)


def _end(state: PartialState, host: object, *, given_up: bool) -> None:
    if given_up:
        # Gloo waits for what was begun, also when the interpreter lets go of it: this never does.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(host))
        return
    state.destroy_process_group()
    type(state)._reset_state()


def _check_devices(device: str) -> None:
    """Raise RequestError for --device values that do not give each process a device."""
    if device not in ("auto", "cuda"):
        raise RequestError(
            f"--device is {device}, the same for all {process_count()} processes: use auto, which gives each a device "
            "of its own, or cpu."
        )
    here, needed = torch.cuda.device_count(), local_rank() + 1
    if here < needed:
        raise RequestError(
            f"{socket.gethostname()} has {here} CUDA devices for {needed} processes or more: start as many as there "
            "are devices, or add --device cpu."
        )
