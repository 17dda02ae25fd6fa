"""The process that holds one model, and the parent's end of the pipe to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prune_cli.bench.result import Round
from prune_cli.errors import PruneError

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_READ_BYTES = 1 << 24
_GOODBYE_SECONDS = 5.0


@dataclass(frozen=True)
class Spec:
    """What a child is told when it starts; `files` are the safetensors, `dtype` and `device` as torch spells them."""

    given: str
    folder: Path
    files: tuple[Path, ...]
    dtype: str
    device: str
    trust_remote_code: bool
    verbose: bool


@dataclass(frozen=True)
class Loaded:
    """What a child knows once its model is in memory."""

    architecture: str
    parameters: int
    seconds: float
    library_bytes: int
    peak_loading_bytes: int


class Child:
    """A fresh process with one model; a context manager that ends it."""

    def __init__(self, spec: Spec) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._given = spec.given
        self._process = context.Process(target=main, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join(_GOODBYE_SECONDS)
        self._pipe.close()

    def limits(self) -> tuple[int | None, int]:
        return self._ask("limits")

    def load(self) -> Loaded:
        return self._ask("load")

    def generate(self, seed: int, vocabulary: int, shape: tuple[int, int], new_tokens: int) -> Round:
        return self._ask("generate", seed, vocabulary, shape, new_tokens)

    def peak_running_bytes(self) -> int:
        return self._ask("peak")

    def _ask(self, *order: Any) -> Any:
        try:
            self._pipe.send(order)
            error, answer = self._pipe.recv()
        except (EOFError, OSError) as end:
            self._process.join(_GOODBYE_SECONDS)
            raise PruneError(
                f"The process of {self._given} ended by itself (exit code {self._process.exitcode}), as when "
                "the system runs out of memory: both models must fit at once."
            ) from end
        if error is not None:
            raise error(answer)
        return answer


def main(pipe: Connection, spec: Spec) -> None:
    """The child's life: quiet on stdout, which belongs to the parent, and ended by the parent alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if not spec.verbose:
        from prune_cli.model.architecture import calm_libraries

        calm_libraries()
    serve(pipe, spec)


def serve(pipe: Connection, spec: Spec) -> None:
    """Answer orders with (None, answer) or (class of the error, its sentence) until the pipe is closed."""
    desk = _Desk(spec)
    while True:
        try:
            name, *values = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, getattr(desk, name)(*values)))
        except PruneError as error:
            if spec.verbose:
                traceback.print_exc()
            pipe.send((type(error), str(error)))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "out of memory" not in str(error):
                raise
            pipe.send((PruneError, f"{spec.given} does not fit into the memory of {spec.device} beside what is there."))


class _Desk:
    """The orders, a method each."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._model: Any = None

    def limits(self) -> tuple[int | None, int]:
        import torch

        from prune_cli.bench.whole_model import WholeModel

        spec = self._spec
        dtype, device = getattr(torch, spec.dtype), torch.device(spec.device)
        self._model = WholeModel(spec.given, spec.folder, dtype, device, spec.trust_remote_code)
        return self._model.limits()

    def load(self) -> Loaded:
        """Load with the files in the system's cache, so that the disk does not decide which model loads faster."""
        self._model.warm_up_loading()
        for file in self._spec.files:
            _read_through(file)
        before = _resident_bytes()
        _reset_peak(self._spec.device)
        seconds = self._model.load()
        architecture, parameters = self._model.facts()
        self._libraries = before
        loaded = Loaded(architecture, parameters, seconds, before, self._peak())
        _reset_peak(self._spec.device)
        return loaded

    def generate(self, seed: int, vocabulary: int, shape: tuple[int, int], new_tokens: int) -> Round:
        import torch

        prompt = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
        return self._model.generate(prompt, new_tokens)

    def peak(self) -> int:
        return self._peak()

    def _peak(self) -> int:
        import torch

        if self._spec.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self._spec.device)
        return max(0, _peak_resident_bytes() - self._libraries)


def _read_through(file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        while stream.read(_READ_BYTES):
            pass


def _reset_peak(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    # Where the kernel does not let a process forget its peak, that of running is at least that of loading.
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)


def _resident_bytes() -> int:
    return _status("VmRSS:") or _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _status(key: str) -> int | None:
    """A figure of /proc/self/status in bytes; None where there is no such file."""
    if not _STATUS.exists():
        return None
    lines = [line for line in _STATUS.read_text().splitlines() if line.startswith(key)]
    return int(lines[0].split()[1]) * 1024 if lines else None
