"""`prune-cli bench`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands.error_handling import report_failures

_WORK = "What to measure"


def bench(
    model: options.Model,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="Measure OTHER in turn with MODEL and print ratios, MODEL / OTHER."),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Random tokens of the prompt [default: 256, or what the models take].", rich_help_panel=_WORK
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after it.", rich_help_panel=_WORK)] = 32,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.", rich_help_panel=_WORK)] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds after one of warm-up.", rich_help_panel=_WORK)] = 5,
    seed: Annotated[int, typer.Option(help="Of the random prompts.", rich_help_panel=_WORK)] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    against_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of OTHER.", rich_help_panel=options.MACHINE)
    ] = None,
    trust_remote_code: options.Trust = False,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """How fast MODEL is and what it takes: prefill and decode rates, latency, memory, load time, size.

    Each model is loaded by plain transformers into a process of its own (both must fit into memory) and generates from
    random prompts; rounds alternate between the two, so that a busy machine slows both alike. No tokenizer is needed.

    Zeros make nothing faster in plain transformers; fewer blocks, channels, heads or experts do.

    Examples:

    prune-cli bench ./smaller --against ./dense

    prune-cli bench Qwen/Qwen3-0.6B --prompt-tokens 1024 --new-tokens 128 --batch-size 8 --device cuda --json
    """
    with report_failures(as_json=as_json, verbose=verbose):
        from prune_cli.bench.request import BenchRequest
        from prune_cli.commands.log_file import progress_on
        from prune_cli.preflight.requests import check_models

        request = BenchRequest(
            model=model,
            against=against,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            repeats=repeats,
            seed=seed,
            device=device,
            dtype=options.checked_later(dtype),
            revision=revision,
            against_revision=against_revision,
            trust_remote_code=trust_remote_code,
            verbose=verbose,
        )
        request.check()
        check_models([(model, revision), *([(against, against_revision)] if against is not None else [])])
        options.begin([model] if against is None else [model, against], verbose=verbose, quiet=quiet)
        from prune_cli.bench.run import bench as measure
        from prune_cli.bench.table import show_bench

        with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
            result = measure(request, progress)
        options.print_result(
            result.to_json, as_json=as_json, quiet=quiet, show=lambda console: show_bench(console, result)
        )
