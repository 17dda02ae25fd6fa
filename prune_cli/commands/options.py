"""What several commands share: options with their help, reading them, and printing the result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from methods import method_names
from methods.structured import structured_names
from prune_cli.errors import RequestError
from prune_cli.ranks.environment import is_first
from prune_cli.request.presets import PRESETS

RUN, TEXT, MACHINE, OUTPUT = "What to prune", "Calibration and evaluation", "Machine", "Output"
_MOST_DIGITS = 10


def complete_device(incomplete: str) -> list[str]:
    return [name for name in ("auto", "cpu", "cuda", "mps") if name.startswith(incomplete)]


Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a model id of the hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table; errors only.")]
LogFile = Annotated[
    Path | None,
    typer.Option(
        "--log-file", metavar="FILE", help="Add stages, warnings and the end of the run, with times, to this file too."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="List every tensor; show tracebacks and library logs.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=MACHINE)]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.", rich_help_panel=MACHINE),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:N or mps.",
        autocompletion=complete_device,
        rich_help_panel=MACHINE,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the forward pass: auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16.",
        rich_help_panel=MACHINE,
    ),
]
BatchSize = Annotated[str, typer.Option(help="Samples per forward pass, or auto.", rich_help_panel=MACHINE)]
LimitMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="As 20GB or 900MiB, of host and of device, for each process: hidden states beyond what fits wait in files "
        "(on a CPU) or for another pass, at the same results; refused before the start where that is not enough "
        "[default: what is free, and then a warning].",
        show_default=False,
        rich_help_panel=MACHINE,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Several processes on this machine, one for each device: 0,1,2,3 (CUDA devices) or cpu,cpu. Or start them "
        "with torchrun, also on several machines.",
        rich_help_panel=MACHINE,
    ),
]
RankTimeout = Annotated[
    float,
    typer.Option(
        "--rank-timeout",
        metavar="SECONDS",
        help="Of several processes: how long one may give no sign of life (one that solves a layer gives them) before "
        "the run ends.",
        rich_help_panel=MACHINE,
    ),
]
AllowChanged = Annotated[
    bool,
    typer.Option(
        "--allow-changed-inputs",
        help="Go on, with a warning, where weights, texts or files are not those that a report or recipe names.",
        rich_help_panel=MACHINE,
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens per sample [default: 2048, or what the model takes].", rich_help_panel=TEXT),
]


def complete_method(incomplete: str) -> list[str]:
    return [name for name in (*method_names(), *structured_names()) if name.startswith(incomplete)]


def complete_preset(incomplete: str) -> list[str]:
    return [name for name in PRESETS if name.startswith(incomplete)]


def complete_pattern(incomplete: str) -> list[str]:
    return [pattern for pattern in ("2:4", "4:8", "1:4") if pattern.startswith(incomplete)]


def complete_source(incomplete: str) -> list[str]:
    return [name for name in ("builtin", "c4", "wikitext2", "ptb", "hf:") if name.startswith(incomplete)]


def key_values(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise RequestError(f"-o {pair!r} is no KEY=VALUE: prune-cli methods lists each method's options.")
    return dict(pair.split("=", 1) for pair in pairs)


def batch_size_of(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else _number("--batch-size", text, "auto")


def eval_windows_of(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else _number("--eval-windows", text, "all")


def self_calibration_of(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else _number("--self-calibration", text, "auto")


def _number(option: str, text: str, word: str) -> int:
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise RequestError(f"{option} is {text!r}, but must be a whole number or {word}.")
    return int(text)


def checked_later(text: str | None) -> Any:
    """For the words of a Literal: the request checks them, with the rest."""
    return text


def print_result(document: Callable[[], str], *, as_json: bool, quiet: bool, show: Any) -> None:
    """Of several processes by the first; the JSON `document` is made where it is asked for."""
    if not is_first():
        return
    if as_json:
        sys.stdout.write(document())
    elif not quiet:
        show(Console(markup=False))  # names may hold brackets


def begin(models: Sequence[str], *, verbose: bool, quiet: bool) -> None:
    """A line at once, for a request that nothing refused, and then the seconds that torch and transformers take."""
    if not quiet and is_first():
        typer.echo(f"Reading {' and '.join(models)}", err=True)
    calm_libraries(verbose=verbose, quiet=quiet)


def on_devices(devices: str | None, device: str) -> None:
    """Where --devices is given, run this command line in a process for each of them, and exit as they did."""
    if devices is None:
        return
    if device != "auto":
        raise RequestError("--device and --devices exclude each other: give one of them.")
    from prune_cli.ranks.start import start_ranks

    raise typer.Exit(start_ranks(devices, sys.argv[1:]))


def calm_libraries(*, verbose: bool, quiet: bool) -> None:
    if quiet:
        # Read when these libraries are imported, which is later and only where they are needed.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not verbose:
        from prune_cli.model.architecture import calm_libraries as calm

        calm()
