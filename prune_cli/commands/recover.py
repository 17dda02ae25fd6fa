"""`prune-cli recover`."""

from __future__ import annotations

from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands import prune_options as of_prune
from prune_cli.commands import recover_options as its
from prune_cli.commands.error_handling import report_failures


def recover(
    model: its.Model,
    out: its.Out,
    teacher: its.Teacher,
    how: its.How = "block",
    epochs: its.Epochs = None,
    tokens: its.Tokens = None,
    train: its.Train = None,
    rank: its.Rank = None,
    rate: its.Rate = None,
    kl: its.Kl = None,
    square_head: its.SquareHead = None,
    next_token: its.NextToken = None,
    top_k: its.TopK = None,
    store: its.Store = None,
    every: its.Every = None,
    gradient_checkpointing: its.GradientCheckpointing = False,
    calibration: of_prune.Calibration = None,
    samples: its.Samples = None,
    seq_len: options.SeqLen = None,
    seed: its.Seed = 0,
    self_calibration: its.SelfCalibration = 2,
    evaluation: its.Evaluation = None,
    eval_windows: its.EvalWindows = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: its.BatchSize = "auto",
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

    MODEL may be sparse, narrowed, without some blocks or experts, and made by any tool. Zeros stay zero; weights,
    norm gains and biases of the blocks move; embeddings and head stay, and routers but with --how router. With
    --how block one block with its gradients is in memory at a time; else it is the whole model, and never the
    teacher. What is best on samples held out is kept, or all stays as it was.

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
