"""`prune-cli recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands import prune_options as of_prune
from prune_cli.commands.error_handling import report_failures

_TRAINING = "Training"


def recover(
    model: Annotated[str, typer.Argument(help="Folder of a pruned checkpoint, or a model id of the hub.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    teacher: Annotated[
        str, typer.Option(metavar="DENSE", help="The dense model that MODEL was made from: a folder or a model id.")
    ],
    how: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="block: one block after the other learns to do what the dense model's did.",
            rich_help_panel=_TRAINING,
        ),
    ] = "block",
    epochs: Annotated[
        int, typer.Option(help="Times that each block sees the text; the best one is kept.", rich_help_panel=_TRAINING)
    ] = 2,
    rate: Annotated[
        float,
        typer.Option(
            help="Learning rate, as a share of each tensor's size at width 256; less for wider ones.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.02,
    calibration: of_prune.Calibration = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Samples; one of eight is held out [default: 128].", rich_help_panel=options.TEXT),
    ] = None,
    seq_len: options.SeqLen = None,
    seed: Annotated[
        int, typer.Option(help="Of samples, and of the order of batches.", rich_help_panel=options.TEXT)
    ] = 0,
    self_calibration: Annotated[
        int,
        typer.Option(
            help="So many more windows for each one that is fitted, sampled by the teacher.",
            rich_help_panel=options.TEXT,
        ),
    ] = 2,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="SOURCE",
            help="Text that the three losses are measured on: dense, pruned, recovered [default: the part of builtin "
            "that is never calibrated on].",
            rich_help_panel=options.TEXT,
        ),
    ] = None,
    eval_windows: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="So many windows of that text, drawn with --seed, or all [default: 256].",
            rich_help_panel=options.TEXT,
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: Annotated[
        str,
        typer.Option(help="Samples per step of the training, or auto.", rich_help_panel=options.MACHINE),
    ] = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    resume: of_prune.Resume = False,
    overwrite: of_prune.Overwrite = False,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Win back what pruning cost: train what is left of MODEL against the dense model and write OUT with a report.

    MODEL may be sparse, narrowed, without some blocks or experts, and made by any tool. Zeros stay zero; weights, norm
    gains and biases of the blocks move, embeddings, head and routers stay. One block with its gradients is in memory at
    a time. Each block keeps its best epoch on samples held out, or stays as it was.

    Examples:

    prune-cli recover ./pruned ./recovered --teacher Qwen/Qwen3-0.6B

    prune-cli recover ./pruned ./recovered --teacher ./dense --calibration my.jsonl --eval held-out.jsonl
    """
    with report_failures(as_json=as_json, verbose=verbose, out=out):
        from prune_cli.commands.log_file import progress_on
        from prune_cli.preflight.requests import check_models, check_new_folder
        from prune_cli.recovery.render import show_recovery
        from prune_cli.recovery.request import RecoverRequest

        request = RecoverRequest(
            model=model,
            out=out,
            teacher=teacher,
            how=options.checked_later(how),
            epochs=epochs,
            rate=rate,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            self_calibration=self_calibration,
            eval=evaluation,
            eval_windows=None if eval_windows is None else options.eval_windows_of(eval_windows),
            device=device,
            dtype=options.checked_later(dtype),
            batch_size=options.batch_size_of(batch_size),
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        request.check()
        check_models([(model, revision), (teacher, None)], [(calibration, samples), (evaluation, None)], seq_len)
        check_new_folder(out, (model, teacher), resume=resume, overwrite=overwrite)
        options.begin((model, teacher), verbose=verbose, quiet=quiet)
        from prune_cli.recovery.run import recover as run

        with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
            report = run(request, progress)
        options.print_result(
            report.to_json(),
            as_json=as_json,
            quiet=quiet,
            show=lambda console: show_recovery(console, report, verbose=verbose),
        )
