"""Who of the processes is alive, and what ended the run: told by one of them, whoever comes first.

A thread of every process counts in the store that torch.distributed keeps anyway, also while a layer is solved for
minutes; so a rank that is waited for may take its time, and one that is gone or hangs is told by its silence.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from prune_cli.errors import EndedElsewhereError, LostRankError, PruneError

T = TypeVar("T")

_SECONDS_BETWEEN_SIGNS = 0.5
# So many of its signs a rank may miss while it is called for, before it counts as gone.
_MISSED_SIGNS = 10
_INTERRUPTED = 130
_REASON, _CONTINUE = "reason", "--resume continues what is done so far"


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    process: int

    @classmethod
    def here(cls) -> Place:
        return cls(socket.gethostname(), os.getpid())


class LifeSigns:
    """A context in which this rank gives signs of life and notices those of the others.

    `silence` is after how many seconds without a sign a rank counts as hanging.
    """

    def __init__(self, store: Any, rank: int, ranks: int, silence: float) -> None:
        self._store = store
        self._rank = rank
        self._others = [other for other in range(ranks) if other != rank]
        self._ranks = ranks
        self._silence = silence
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._elsewhere: EndedElsewhereError | None = None
        self._store_gone = False
        self._lost: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="prune-cli-life-signs", daemon=True)
        self.places: list[Place] = []

    def __enter__(self) -> LifeSigns:
        self._sign(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self._store_gone:
            self._ask(self._leave)

    def met(self, places: list[Place]) -> None:
        """All ranks have begun, at `places`."""
        self.places = places
        self._ask(self._look)

    def _leave(self) -> None:
        """The first rank, which may keep the store, goes last."""
        self._store.set(f"left/{self._rank}", "")
        last = time.monotonic() + _MISSED_SIGNS * _SECONDS_BETWEEN_SIGNS
        keys = [f"left/{other}" for other in self._others if other not in self._lost]
        while self._rank == 0 and not self._store.check(keys) and time.monotonic() < last:
            time.sleep(_SECONDS_BETWEEN_SIGNS / 50)

    def _ask(self, question: Callable[[], T]) -> T | None:
        """What the store says; None once its host is gone."""
        try:
            return question()
        except RuntimeError:
            self._store_gone = True
            return None

    # --- the thread ---------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        count = 0
        while not self._ended.wait(_SECONDS_BETWEEN_SIGNS):
            count += 1
            self._ask(lambda count=count: self._sign(count))
            self._ask(self._look)
            if self._store_gone:
                return

    def _sign(self, count: int) -> None:
        self._store.set(f"alive/{self._rank}", str(count))

    def _look(self) -> None:
        now = time.monotonic()
        for other in self._others:
            key = f"alive/{other}"
            # A rank that has not begun yet hangs too, if it does not begin at all.
            sign = self._store.get(key) if self._store.check([key]) else b""
            before = self._seen.get(other)
            if before is None or before[0] != sign:
                self._seen[other] = sign, now
        if self._store.check([_REASON]):
            reason = json.loads(self._store.get(_REASON))
            if reason["rank"] != self._rank:
                self._elsewhere = EndedElsewhereError(reason["sentence"], reason["exit_code"])

    # --- what a process that waits asks -------------------------------------------------------------------------

    def check(self) -> None:
        """Raise PruneError where there is nobody to wait for."""
        if self._elsewhere is not None:
            raise self._elsewhere
        if self._store_gone:
            raise LostRankError(self._store_lost())
        now = time.monotonic()
        for other, (_, since) in self._seen.items():
            if now - since > self._silence:
                self._lost.append(other)
                raise LostRankError(
                    f"{self._name(other)} has given no sign of life for {self._silence:g} s (--rank-timeout); "
                    f"{_CONTINUE}."
                )

    def reason_of(self, error: Exception) -> PruneError:
        """What lies behind an exchange that failed with `error`."""
        gone = self._gone()
        self._ask(self._look)
        if self._elsewhere is not None:
            return self._elsewhere
        if gone:
            return LostRankError(self._is_gone(gone[0]))
        if self._store_gone:
            return LostRankError(self._store_lost())
        return LostRankError(f"The processes have lost each other ({' '.join(str(error).split())}); {_CONTINUE}.")

    def _store_lost(self) -> str:
        return f"{self._name(0)}, or what started it, is gone; {_CONTINUE}."

    def _name(self, rank: int) -> str:
        where = f" (process {self.places[rank].process} on {self.places[rank].host})" if self.places else ""
        return f"Rank {rank} of {self._ranks}{where}"

    def _gone(self) -> list[int]:
        """The ranks that give no more signs; waits until all others have given two, or a reason is known."""
        before = {other: sign for other, (sign, _) in self._seen.items()}
        # The first may have been given before the rank ended, and been read afterwards.
        missing = dict.fromkeys(before, 2)
        last = time.monotonic() + _MISSED_SIGNS * _SECONDS_BETWEEN_SIGNS
        gone = list(before)
        while gone and self._elsewhere is None and not self._store_gone and time.monotonic() < last:
            time.sleep(_SECONDS_BETWEEN_SIGNS / 10)
            for other in gone:
                sign = self._seen[other][0]
                missing[other] -= sign != before[other]
                before[other] = sign
            gone = [other for other in gone if missing[other] > 0]
        self._lost += gone
        return gone

    # --- the end ------------------------------------------------------------------------------------------------

    def tell(self, error: BaseException) -> BaseException:
        """What this rank raises for `error`, which ends the run for all; `told_here` where it is the first to tell."""
        if isinstance(error, EndedElsewhereError):
            return error
        # A launcher interrupts those that are left when one is gone.
        gone = self._gone() if isinstance(error, KeyboardInterrupt) else []
        if gone:
            error = LostRankError(self._is_gone(gone[0]))
        code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        reason = {"rank": self._rank, "sentence": str(error), "exit_code": code}
        told = self._ask(lambda: json.loads(self._store.compare_set(_REASON, "", json.dumps(reason))))
        if told is None:  # the first rank is gone, and the second tells it
            told = {**reason, "rank": min(self._rank, 1)}
        if told["rank"] != self._rank:
            return EndedElsewhereError(told["sentence"], told["exit_code"])
        if type(error) is PruneError:
            error = PruneError(f"Rank {self._rank} of {self._ranks}: {error}")
        error.told_here = True  # pyright: ignore[reportAttributeAccessIssue]
        return error

    def _is_gone(self, rank: int) -> str:
        return f"{self._name(rank)} is gone (killed, or out of memory); {_CONTINUE}."
