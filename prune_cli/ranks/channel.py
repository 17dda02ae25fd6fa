"""What the processes send each other, over torch.distributed, and the waiting for it.

Operations are started and then looked after, for torch's own wait returns neither for a signal nor while it waits for
a process that hangs.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from prune_cli.ranks.life_signs import LifeSigns

_FIRST_PAUSE, _LONGEST_PAUSE = 1e-5, 2e-3


class Channel:
    """`host` is the group for tensors in the host's memory; those on a device go by the default group.

    `bytes_reduced` and `seconds_waited` count what it did and cost here; `pending` after an exchange that was given up.
    """

    def __init__(self, host: Any, ranks: int, life_signs: LifeSigns) -> None:
        self._host = host
        self._ranks = ranks
        self.life_signs = life_signs
        self.bytes_reduced = 0
        self.seconds_waited = 0.0
        self.pending = False

    def gather(self, data: bytes) -> list[bytes]:
        """`data` of every rank, which may differ in length."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self._ranks)]
        self._wait(dist.all_gather(sizes, torch.tensor([len(data)]), group=self._host, async_op=True))
        longest = max(int(size) for size in sizes)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        mine = _as_tensor(data + bytes(longest - len(data)))
        self._wait(dist.all_gather(parts, mine, group=self._host, async_op=True))
        self.bytes_reduced += len(data)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def broadcast(self, data: bytes | None, source: int) -> bytes:
        """`data` of the rank `source`."""
        size = torch.tensor([0 if data is None else len(data)])
        self._wait(dist.broadcast(size, source, group=self._host, async_op=True))
        content = torch.empty(int(size), dtype=torch.uint8) if data is None else _as_tensor(data)
        self._wait(dist.broadcast(content, source, group=self._host, async_op=True))
        return content.numpy().tobytes() if data is None else data

    def least(self, number: int) -> int:
        found = torch.tensor([number])
        self._wait(dist.all_reduce(found, dist.ReduceOp.MIN, group=self._host, async_op=True))
        return int(found)

    def add_up(self, tensor: torch.Tensor) -> None:
        group = self._host if tensor.device.type == "cpu" else None
        self._wait(dist.all_reduce(tensor, group=group, async_op=True))
        self.bytes_reduced += tensor.nbytes

    def _wait(self, work: Any) -> None:
        """Raises what `LifeSigns` finds where another process has ended or is silent."""
        begun, pause, self.pending = time.monotonic(), _FIRST_PAUSE, True
        while not work.is_completed():
            self.life_signs.check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self.pending = False
        try:
            work.wait()
        except RuntimeError as error:
            raise self.life_signs.reason_of(error) from error
        self.seconds_waited += time.monotonic() - begun


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
