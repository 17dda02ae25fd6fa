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
            help="block: one block after the other learns to do what the dense model's did. full: all kept weights "
            "together learn what the dense model predicts; lora: low-rank updates of them, folded in; router: the rows "
            "of experts' routers alone.",
            rich_help_panel=_TRAINING,
        ),
    ] = "block",
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Times that the text is seen; the best state is kept [default: 2 for block, else 4].",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="All but block: so many tokens to train on, in place of --epochs.", rich_help_panel=_TRAINING
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="full, lora: what moves, of norms, biases, attention and mlp, with commas; all is every one "
            "[default: all].",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="lora: of the updates of each matrix [default: 16].", rich_help_panel=_TRAINING),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Learning rate, as a share of each tensor's size at width 256; less for wider ones "
            "[default: 0.02 for block, else 0.01].",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(
            help="All but block: weight of the divergence from the teacher's predictions [default: 1].",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    square_head: Annotated[
        float | None,
        typer.Option(
            help="All but block: weight of the distance to the teacher's hidden states behind each block, which need "
            "much room in --store [default: 0].",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    next_token: Annotated[
        float | None,
        typer.Option(
            help="All but block: weight of the loss on the text itself [default: 0].", rich_help_panel=_TRAINING
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="All but block: so many of the teacher's most probable tokens are kept of each position "
            "[default: 50].",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="All but block: keep what the teacher predicts here, for other runs with it and the same text "
            "[default: in OUT while it is made].",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="All but block: look at the held-out samples, and save the state for --resume, so often "
            "[default: 20 times].",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="All but block: less memory, a third more time: activations inside the blocks are computed twice.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
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
    gains and biases of the blocks move, embeddings, head and routers stay. With --how block one block with its
    gradients is in memory at a time; else it is the whole model, and never the teacher. What is best on samples held
    out is kept, or all stays as it was.

    Examples:

    prune-cli recover ./pruned ./recovered --teacher Qwen/Qwen3-0.6B

    prune-cli recover ./pruned ./recovered --teacher ./dense --calibration my.jsonl --eval held-out.jsonl

    prune-cli recover ./pruned ./recovered --teacher ./dense --how full --samples 2000 --tokens 2000000
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
            tokens=tokens,
            rate=rate,
            train=train,
            rank=rank,
            kl=kl,
            square_head=square_head,
            next_token=next_token,
            top_k=top_k,
            store=store,
            every=every,
            gradient_checkpointing=gradient_checkpointing,
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
            report.to_json,
            as_json=as_json,
            quiet=quiet,
            show=lambda console: show_recovery(console, report, verbose=verbose),
        )
