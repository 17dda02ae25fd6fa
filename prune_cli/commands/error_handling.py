"""How a failure reaches the user: one sentence on stderr, an exit code, and how to go on after an interrupt."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from prune_cli.errors import EndedElsewhereError, LostRankError, PruneError, RequestError
from prune_cli.ranks.environment import is_first, process_count

INTERRUPTED = 130


@contextmanager
def report_failures(
    *, as_json: bool, verbose: bool, out: Path | None = None, interrupted_says: str | None = None
) -> Iterator[None]:
    """Every failure becomes one sentence on stderr and an exit code; with --json also a document on stdout.

    `out` is the folder that an interrupted run would be continued in; `interrupted_says` is told instead, if given.
    Of several processes one tells: the first, or where they ended each other the one that was first to fail.
    """
    _calm_torch()
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        if interrupted and process_count() > 1:
            return  # the terminal interrupts all processes, and then what started them does so too
        interrupted = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not _tells(error):
            raise typer.Exit(INTERRUPTED if interrupted else getattr(error, "exit_code", 1)) from error
        # An interrupt inside a library may come out of it as an error of its own.
        if (interrupted and not isinstance(error, LostRankError)) or isinstance(error, KeyboardInterrupt):
            _fail(interrupted_says or _how_to_continue(out), INTERRUPTED, as_json=as_json)
        sentence = _sentence(error)
        if sentence is None:
            raise
        if verbose:
            Console(stderr=True).print_exception()
        _fail(sentence, error.exit_code if isinstance(error, PruneError) else 1, as_json=as_json)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_several_processes(command: str | None) -> None:
    """End a `command` that only one process can run, where several were started."""
    if process_count() > 1:
        with report_failures(as_json=False, verbose=False):
            raise RequestError(f"prune-cli {command} runs in one process: start it without torchrun or the like.")


def _tells(error: BaseException) -> bool:
    """Whether this process is the one to say so."""
    return not isinstance(error, EndedElsewhereError) and (is_first() or getattr(error, "told_here", False))


def _calm_torch() -> None:
    """Of several processes, torch logs every connection that ends with another; ours tell it in one sentence."""
    if process_count() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _sentence(error: BaseException) -> str | None:
    """What to tell a user about an error; None for one that is a mistake of ours and deserves its traceback."""
    if isinstance(error, PruneError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"Out of memory ({error}): use fewer --samples or a smaller --batch-size."
    if isinstance(error, OSError):
        return f"The system refused to read or write ({error}); --resume continues once that is mended."
    if isinstance(error, RuntimeError) and "out of memory" in str(error):
        return "The device is out of memory: use a smaller --batch-size, fewer --samples or --device cpu."
    return None


def _how_to_continue(out: Path | None) -> str:
    if out is None or not out.with_name(out.name + ".partial").exists():
        return "Interrupted; nothing was written."
    if process_count() > 1:
        return "Interrupted; repeat the command with --resume to continue."
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return f"Interrupted; continue with: prune-cli {shlex.join([*words, '--resume'])}"


def _fail(message: str, code: int, *, as_json: bool) -> None:
    typer.echo(f"Error: {message}" if code != INTERRUPTED else message, err=True)
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit_code": code}) + "\n")
    raise typer.Exit(code)
