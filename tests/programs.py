"""The programs `prune-cli` and `python` for the PATH of a shell; what the first is asked runs in a ForkedRun."""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from threading import Thread

from tests.forked import ForkedRun

_CALL = """#!{python} -IS
import os, sys
from multiprocessing.connection import Client
with Client({address!r}) as connection:
    connection.send((sys.argv[1:], dict(os.environ), os.getcwd()))
    code, stdout, stderr = connection.recv()
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(code)
"""

_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m prune_cli" ]; then shift 2; exec "{folder}/prune-cli" "$@"; fi
exec "{python}" "$@"
"""


@cache
def programs() -> Path:
    """The folder to put first on PATH."""
    folder = Path(tempfile.mkdtemp(prefix="programs-"))
    listener = Listener(str(folder / "calls"))
    Thread(target=_answer, args=(listener,), daemon=True).start()
    (folder / "prune-cli").write_text(_CALL.format(python=sys.executable, address=listener.address))
    (folder / "python").write_text(_PYTHON.format(python=sys.executable, folder=folder))
    for name in ("prune-cli", "python"):
        (folder / name).chmod(0o755)
    return folder


def _answer(listener: Listener) -> None:
    while True:
        Thread(target=_run, args=(listener.accept(),), daemon=True).start()


def _run(connection: Connection) -> None:
    with connection:
        arguments, environment, folder = connection.recv()
        run = ForkedRun(*arguments, env=environment, cwd=folder)
        stdout, stderr = run.communicate(timeout=600)
        connection.send((run.returncode, stdout, stderr))
