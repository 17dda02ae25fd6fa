"""`prune-cli eval`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from prune_cli.commands import options
from prune_cli.failures import told_failures


def evaluate(
    model: options.Model,
    data: Annotated[str, typer.Option(metavar="SOURCE", help="Text, as for --calibration of prune.")],
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The dense model to compare with.")] = None,
    samples: Annotated[int | None, typer.Option(help="Only the first windows [default: all].")] = None,
    seq_len: options.SeqLen = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Perplexity of MODEL; against a dense model also KL divergence, agreement and the difference of the losses.

    The text is cut into consecutive windows of --seq-len tokens; each is predicted on its own. One block of weights is
    in memory at a time.
    """
    with told_failures(as_json=as_json, verbose=verbose):
        from prune_cli.measure import EvaluationRequest, measure
        from prune_cli.progress import progress_on
        from prune_cli.render import show_evaluation

        options.calm_libraries(verbose=verbose, quiet=quiet)
        request = EvaluationRequest(
            model=model,
            data=data,
            against=against,
            samples=samples,
            seq_len=seq_len,
            device=device,
            dtype=options.checked_later(dtype),
            batch_size=options.batch_size_of(batch_size),
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        with progress_on(Console(stderr=True), quiet=quiet) as progress:
            result = measure(request, progress)
        options.print_result(
            result.to_json(), as_json=as_json, quiet=quiet, show=lambda console: show_evaluation(console, result)
        )
