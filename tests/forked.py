"""Processes without the seconds of imports: forks of one that has torch and transformers, and nothing of ours.

`prune-cli` is forked from a fork that has our modules too. Each gets its own environment, working folder and
output, as a program that a user starts does.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock

_IMPORTED = (
    "torch", "safetensors.torch", "huggingface_hub.hf_api", "huggingface_hub.constants", "tokenizers", "typer",
    "transformers.modeling_utils", "transformers.generation", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers", "accelerate", "greenlet", "jinja2", "rich.progress",
    "typer._adapters", "tests.warm",
)  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")


class _WithOurs(forkserver.ForkServer):
    """Itself forked from the bare one, so that it has to import our modules alone."""

    def ensure_running(self) -> None:
        if self._forkserver_alive_fd is not None:
            return
        self._folder = tempfile.TemporaryDirectory()  # goes when the tests end
        self._forkserver_address = str(Path(self._folder.name) / "asked")
        alive, self._writer = SERVER.Pipe(duplex=False)
        self._forkserver_alive_fd = self._writer.fileno()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._forkserver_address)
            listener.listen()
            _choose(_BARE)
            SERVER.Process(target=_serve, args=(listener, alive), daemon=True).start()
            _choose(self)


def _serve(listener: socket.socket, alive: Connection) -> None:
    importlib.import_module("tests.warm_ours")
    forkserver.main(listener.detach(), alive.fileno(), [])  # pyright: ignore[reportAttributeAccessIssue]


def _choose(server: forkserver.ForkServer) -> None:
    """The one that the next process is forked from; multiprocessing itself knows a single one."""
    setattr(forkserver, "connect_to_new_process", server.connect_to_new_process)  # noqa: B010 - a function there


_BARE, _WITH_OURS, _STARTING = forkserver.ForkServer(), _WithOurs(), Lock()
_BARE.set_forkserver_preload(list(_IMPORTED))
_choose(_WITH_OURS)


@dataclass(frozen=True)
class _Process:
    """What a child becomes: `program` is code, or None for prune-cli's command line; `printed` are two files."""

    program: str | None
    arguments: list[str]
    printed: Sequence[str]
    environment: Mapping[str, str]
    folder: str

    def become(self) -> None:
        for stream, path in zip((sys.stdout, sys.stderr), self.printed, strict=True):
            with Path(path).open("w") as file:
                os.dup2(file.fileno(), stream.fileno())
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        _read_the_environment_again()
        sys.argv = ["prune-cli" if self.program is None else "-c", *self.arguments]
        if self.program is None:
            from prune_cli.cli import run

            run()
        else:
            for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
                del sys.modules[name]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(self.program, "<program>", "exec"), main.__dict__)


def _read_the_environment_again() -> None:
    """What libraries read at their import, which lies before the fork."""
    from huggingface_hub import constants
    from transformers import dynamic_module_utils

    importlib.reload(constants)
    modules = os.environ.get("HF_MODULES_CACHE", str(Path(constants.HF_HOME) / "modules"))
    setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)  # noqa: B010 - not exported


class ForkedRun:
    """As subprocess.Popen of `prune-cli` (or of `python -c PROGRAM`), as far as the tests ask it."""

    def __init__(
        self,
        *arguments: object,
        program: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")]
        texts = [str(each) for each in arguments]
        process = _Process(program, texts, self._files, dict(env or os.environ), str(cwd or Path.cwd()))
        self._process = SERVER.Process(target=process.become)
        with _STARTING:
            _choose(_WITH_OURS if program is None else _BARE)
            self._process.start()
            _choose(_WITH_OURS)
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


def run_program(program: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """`python -c PROGRAM ARGUMENTS`, in which nothing of ours is imported; options as ForkedRun's."""
    run = ForkedRun(*arguments, program=program, **options)  # pyright: ignore[reportArgumentType]
    stdout, stderr = run.communicate(timeout=300)
    return subprocess.CompletedProcess([program, *map(str, arguments)], run.returncode or 0, stdout, stderr)


def forked_ranks(count: int, *arguments: object) -> list[ForkedRun]:
    """The same command in `count` processes, told of each other as torchrun tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    every = {**os.environ, **where, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [ForkedRun(*arguments, env={**every, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
