"""`prune-cli check`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from prune_cli.commands import check_options as its
from prune_cli.commands import options
from prune_cli.commands.error_handling import report_failures

if TYPE_CHECKING:
    from pathlib import Path

    from prune_cli.checks.request import GateRequest


def check(
    target: its.Target,
    max_perplexity: its.MaxPerplexity = None,
    max_perplexity_increase: its.MaxPerplexityIncrease = None,
    max_kl: its.MaxKl = None,
    min_top1: its.MinTop1 = None,
    min_sparsity: its.MinSparsity = None,
    max_size: its.MaxSize = None,
    baseline: its.Baseline = None,
    thresholds: its.ThresholdsFile = None,
    require_loadable: its.RequireLoadable = False,
    data: its.Data = None,
    against: its.Against = None,
    eval_windows: its.EvalWindows = None,
    seq_len: options.SeqLen = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_changed_inputs: options.AllowChanged = False,
    junit: its.Junit = None,
    github: its.Github = None,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Hold a pruned model against rules, and end with 1 where one fails.

    A model is measured, whatever its report says: zeros counted in the files, perplexity and distances by running it
    beside the dense model, the files' hashes compared with the report in its folder. Given a report's JSON file, the
    figures in it are taken. Exit codes: 0 all rules hold, 1 a rule fails, 2 the request was wrong or a rule cannot be
    decided.
    """
    limits: dict[str, str | None] = {
        "--max-perplexity": max_perplexity,
        "--max-perplexity-increase": max_perplexity_increase,
        "--max-kl": max_kl,
        "--min-top1": min_top1,
        "--min-sparsity": min_sparsity,
        "--max-size": max_size,
    }
    with report_failures(as_json=as_json, verbose=verbose):
        from prune_cli.checks.baseline import limits_of
        from prune_cli.checks.request import GateRequest
        from prune_cli.checks.rules import Thresholds
        from prune_cli.checks.thresholds_file import NO_FILE, read_thresholds
        from prune_cli.preflight.requests import check_models

        said = {option: text for option, text in limits.items() if text is not None}
        file = read_thresholds(thresholds) if thresholds is not None else NO_FILE
        limits = {**(limits_of(baseline, target) if baseline is not None else {}), **file.limits, **said}
        request = GateRequest(
            target=target,
            asked=Thresholds.parse(limits, loadable=require_loadable or file.loadable, beside=file.fields),
            data=data,
            against=against,
            eval_windows=eval_windows,
            seq_len=seq_len,
            device=device,
            dtype=options.checked_later(dtype),
            batch_size=options.batch_size_of(batch_size),
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_changed_inputs=allow_changed_inputs,
        )
        on_github = github if github is not None else os.environ.get("GITHUB_ACTIONS") == "true"
        if not request.is_report:
            check_models([(target, revision)])
            options.begin((target,), verbose=verbose, quiet=quiet)
        passed = _decide(request, junit, log_file, on_github=on_github, as_json=as_json, quiet=quiet)
    if not passed:
        raise typer.Exit(1)


def _decide(
    request: GateRequest, junit: Path | None, log_file: Path | None, *, on_github: bool, as_json: bool, quiet: bool
) -> bool:
    from prune_cli.checks import outputs
    from prune_cli.checks.check import check as decide
    from prune_cli.commands.log_file import progress_on

    if junit is not None:
        outputs.check_junit_path(junit)
    begun = time.monotonic()
    with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
        result = decide(request, progress)
    if junit is not None:
        junit.write_text(outputs.to_junit(result, time.monotonic() - begun), encoding="utf-8")
    if on_github:
        for line in outputs.on_github(result):
            typer.echo(line, err=True)
    options.print_result(
        result.to_json, as_json=as_json, quiet=quiet, show=lambda console: outputs.show_gate(console, result)
    )
    if quiet and not result.passed:
        typer.echo(outputs.verdict_of(result), err=True)
    return result.passed
