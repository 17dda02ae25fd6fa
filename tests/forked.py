"""`prune-cli` as a process of its own without the seconds that imports take: a fork of one that has imported it all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__, "prune_cli.run", "prune_cli.sparse.convert", "tests.tiny"])


def run_app(arguments: list[str], stdout: str, stderr: str) -> None:
    """What the child does: the command line, printing into two files."""
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        with Path(path).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    from prune_cli.cli import app

    sys.argv = ["prune-cli", *arguments]
    app()


class ForkedRun:
    """As subprocess.Popen, as far as the tests ask it."""

    def __init__(self, *arguments: object) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")]
        self._process = _SERVER.Process(target=run_app, args=([str(each) for each in arguments], *self._files))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; what was printed."""
        self._process.join(timeout)
        assert self.poll() is not None, f"it still runs after {timeout} s"
        stdout, stderr = (Path(file).read_text() if Path(file).exists() else "" for file in self._files)
        self._folder.cleanup()
        return stdout, stderr
