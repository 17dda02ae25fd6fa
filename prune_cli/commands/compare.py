"""`prune-cli compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands.error_handling import report_failures
from prune_cli.errors import RequestError


def compare(
    model: options.Model,
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The dense model, a folder or a model id of the hub.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A text to continue; may be given several times.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A prompt a line.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 32,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_changed_inputs: options.AllowChanged = False,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """What MODEL and DENSE say after the same prompts, side by side: damage that perplexity hides.

    Each model takes its likeliest token, and prompts stand in its chat template where it has one. One block of weights
    is in memory at a time, and every token is a pass through the model. Without prompts some of our own are continued.

    Examples:

    prune-cli compare ./pruned ./dense --prompt "The capital of France is"
    """
    with report_failures(as_json=as_json, verbose=verbose):
        if prompt and prompts is not None:
            raise RequestError("--prompt and --prompts exclude each other: give texts, or a file of them.")
        from prune_cli.commands.log_file import progress_on
        from prune_cli.evaluation.requests import CompareRequest, read_prompt_file
        from prune_cli.preflight.requests import check_models

        chosen = tuple(prompt or ()) if prompts is None else read_prompt_file(prompts)
        request = CompareRequest(
            model=model,
            dense=dense,
            prompts=chosen,
            tokens=tokens,
            device=device,
            dtype=options.checked_later(dtype),
            trust_remote_code=trust_remote_code,
            revision=revision,
            allow_changed_inputs=allow_changed_inputs,
        )
        request.check()
        check_models([(model, revision), (dense, None)])
        options.begin((model, dense), verbose=verbose, quiet=quiet)
        from prune_cli.commands.terminal import show_continuations
        from prune_cli.evaluation.compare import compare_texts
        from prune_cli.report.continuations import as_markdown

        with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
            result = compare_texts(request, progress)

        def show(console: Console) -> None:
            if markdown:
                typer.echo(as_markdown(result.continuations))
            else:
                show_continuations(console, result.continuations)
            for warning in result.warnings:
                console.print(f"Warning: {warning}", highlight=False, soft_wrap=True)

        options.print_result(result.to_json, as_json=as_json, quiet=quiet, show=show)
