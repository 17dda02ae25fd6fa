"""Run a command as a process of its own and watch it from outside: seconds and peak anonymous memory. Linux only."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

# Often enough to see a peak, seldom enough to cost the watched process nothing.
_INTERVAL = 0.01
_SHOWN_OF_ERROR = 3000


@dataclass(frozen=True)
class Watched:
    """What a finished process took: wall seconds from start to end, and its highest RssAnon."""

    seconds: float
    peak_bytes: int
    stdout: str


class _Sampler(Thread):
    """Reads RssAnon of one process until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._over = Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._over.wait(_INTERVAL):
            self.peak_bytes = max(self.peak_bytes, self._anonymous())

    def _anonymous(self) -> int:
        try:
            lines = self._status.read_text().splitlines()
        except OSError:  # the process has ended
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.peak_bytes


def watch(command: Sequence[str]) -> Watched:
    """Run `command` to its end; ends this program with the command's last words if it fails."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    sampler = _Sampler(process.pid)
    sampler.start()
    try:
        stdout, stderr = process.communicate()
        seconds = time.monotonic() - begun
    except BaseException:
        process.kill()
        raise
    finally:
        peak = sampler.stop()
    if process.returncode:
        sys.exit(f"failed with exit code {process.returncode}: {' '.join(command)}\n{stderr[-_SHOWN_OF_ERROR:]}")
    return Watched(seconds, peak, stdout)
