"""`prune-cli prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prune_cli.commands.options import (
    OUTPUT,
    RUN,
    TEXT,
    BatchSize,
    Device,
    Dtype,
    Json,
    Model,
    Quiet,
    Revision,
    SeqLen,
    Trust,
    Verbose,
    batch_size_of,
    calm_libraries,
    checked_later,
    complete_method,
    key_values,
    print_result,
)
from prune_cli.failures import told_failures


def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="fast (wanda), balanced (admm) or best (admm, dense target); what else is said wins.",
            rich_help_panel=RUN,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="See prune-cli methods [default: wanda].",
            autocompletion=complete_method,
            rich_help_panel=RUN,
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", "-s", help="Share of each tensor to remove [default: 0.5].", rich_help_panel=RUN),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M instead: keep N of every M inputs, as 2:4.", rich_help_panel=RUN)
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Spread the sparsity over the tensors: uniform, erk, owl, atp, global, or file:PATH (an allocation or "
            "a report) [default: uniform].",
            rich_help_panel=RUN,
        ),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(metavar="STEP", help="Improve the mask afterwards: swaps or dsnot.", rich_help_panel=RUN),
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Fit the kept weights by least squares.", rich_help_panel=RUN)
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="KEY=VALUE",
            help="An option of the method, or of a step or allocation as swaps.rounds=8, owl.spread=0.1.",
            rich_help_panel=RUN,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Glob on tensor names. One that matches linear maps of the blocks narrows the run to them; any other "
            "adds what it names (embeddings, head, norms, routers, biases).",
            rich_help_panel=RUN,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Glob on tensor names to keep as they are.", rich_help_panel=RUN),
    ] = None,
    allow_unsupported: Annotated[
        bool,
        typer.Option("--allow-unsupported", help="Keep tensors that cannot be pruned (experts).", rich_help_panel=RUN),
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Text: builtin, c4, wikitext2, ptb, hf:REPO[:CONFIG][:SPLIT][:COLUMN], a file or a folder "
            "[default: builtin].",
            rich_help_panel=TEXT,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration samples [default: 128].", rich_help_panel=TEXT)
    ] = None,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(help="Of samples and of random choices.", rich_help_panel=TEXT)] = 0,
    calibrate_by: Annotated[
        str,
        typer.Option(
            help="sublayer: one pass, a map sees the maps before it pruned; block: two passes, like the authors.",
            rich_help_panel=TEXT,
        ),
    ] = "sublayer",
    target: Annotated[
        str | None,
        typer.Option(
            help="What sparsegpt and admm solve for. pruned: what the dense map gives on its inputs now; dense: what "
            "it gave in the dense model (a second stream of hidden states; much better) [default: pruned].",
            rich_help_panel=TEXT,
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval", metavar="SOURCE", help="Perplexity on this text, before and after.", rich_help_panel=TEXT
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run, if there is one.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, or an interrupted run.", rich_help_panel=OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would happen and stop.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prune MODEL and write OUT with a report.

    The linear maps of the decoder blocks are pruned; embeddings, output head, norms, routers and biases stay.
    Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted (continue with --resume).
    """
    with told_failures(as_json=as_json, verbose=verbose, out=out):
        from prune_cli.presets import with_preset
        from prune_cli.request import PruneRequest

        options = with_preset(
            {
                "preset": preset,
                "model": model,
                "out": out,
                "method": method,
                "sparsity": sparsity,
                "pattern": pattern,
                "allocate": allocate,
                "refine": refine,
                "reconstruct": reconstruct or None,
                "options": key_values(option or []),
                "calibration": calibration,
                "samples": samples,
                "seq_len": seq_len,
                "seed": seed,
                "device": device,
                "dtype": checked_later(dtype),
                "batch_size": batch_size_of(batch_size),
                "include": tuple(include or ()),
                "exclude": tuple(exclude or ()),
                "calibrate_by": checked_later(calibrate_by),
                "target": target,
                "eval": evaluation,
                "resume": resume,
                "overwrite": overwrite,
                "allow_unsupported": allow_unsupported,
                "trust_remote_code": trust_remote_code,
                "revision": revision,
            }
        )
        request = PruneRequest(**options)
        request.check()
        calm_libraries(verbose=verbose, quiet=quiet)
        if dry_run:
            from prune_cli.estimate import dry_run as estimate
            from prune_cli.render import show_dry_run

            plan = estimate(request)
            print_result(plan.to_json(), as_json=as_json, quiet=quiet, show=lambda console: show_dry_run(console, plan))
            return
        from prune_cli.progress import progress_on
        from prune_cli.render import show_report
        from prune_cli.run import prune as run

        with progress_on(Console(stderr=True), quiet=quiet) as progress:
            report = run(request, progress)
        print_result(
            report.to_json(),
            as_json=as_json,
            quiet=quiet,
            show=lambda console: show_report(console, report, verbose=verbose),
        )
