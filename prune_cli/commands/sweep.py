"""`prune-cli sweep`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands import prune_options as its
from prune_cli.commands import sweep_options as grid
from prune_cli.commands.error_handling import report_failures

if TYPE_CHECKING:
    from pathlib import Path

    from prune_cli.sweeps.request import SweepRequest
    from prune_cli.sweeps.search_request import SearchRequest


def sweep(
    model: options.Model,
    out: grid.Out,
    data: grid.Data,
    windows: grid.Windows = None,
    method: grid.Methods = "wanda",
    sparsity: grid.Grid = "0:0.9:0.1",
    pattern: grid.Patterns = None,
    option: grid.Option = None,
    sensitivity: grid.Sensitivity = 0.5,
    search: grid.Search = None,
    budget: grid.Budget = None,
    held_out: grid.HeldOut = None,
    include: its.Include = None,
    exclude: its.Exclude = None,
    allow_unsupported: its.AllowUnsupported = False,
    calibration: its.Calibration = None,
    samples: its.Samples = None,
    seq_len: options.SeqLen = None,
    seed: its.Seed = 0,
    calibrate_by: its.CalibrateBy = "sublayer",
    device: grid.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = "auto",
    limit_memory: options.LimitMemory = None,
    packed: its.Packed = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    resume: grid.Resume = False,
    overwrite: its.Overwrite = False,
    dry_run: its.DryRun = False,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure the loss of MODEL over a grid of methods and sparsities; write curves and tables to OUTDIR.

    Each point is pruned and evaluated in memory, in one pass over the model, and gives what prune and eval would give;
    no checkpoint is written. OUTDIR gets sweep.json, sweep.csv, blocks.csv, the plot sweep.svg and sweep.png, and
    points.jsonl (the loss of every window).

    The knee of a method is the sparsity beyond which its loss grows much faster: the breakpoint of a continuous line of
    two segments, fitted by least squares to the loss increase over the sparsity, with a 95 % interval (F test of the
    fit, widened by a bootstrap over the evaluation windows). Where one line fits as well, there is none.

    With --search OUTDIR gets search.json and allocation.json, for prune --allocate file:OUTDIR/allocation.json.
    Candidates keep the total exactly and are judged on held-out calibration windows; then the best is compared on
    --data with the uniform allocation and with random search.
    """
    with report_failures(as_json=as_json, verbose=verbose, out=out):
        from prune_cli.preflight.requests import check_prune
        from prune_cli.sweeps.request import SweepRequest

        request = SweepRequest(
            model=model,
            out=out,
            data=data,
            windows=windows,
            method=method,
            sparsity=sparsity,
            pattern=pattern,
            options=options.key_values(option or []),
            sensitivity=sensitivity,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            calibrate_by=options.checked_later(calibrate_by),
            device=device,
            dtype=options.checked_later(dtype),
            batch_size=options.batch_size_of(batch_size),
            limit_memory=limit_memory,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            allow_unsupported=allow_unsupported,
            packed=options.checked_later(packed),
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        request.check()
        wanted = _search_request(request, search, budget, held_out, dry_run=dry_run)
        for pruning in {each.request.pattern: each.request for each in request.points()}.values():
            check_prune(pruning, writes=False)
        options.begin((model,), verbose=verbose, quiet=quiet)
        if wanted is not None:
            _search(wanted, log_file, as_json=as_json, quiet=quiet)
        else:
            _run(request, log_file, dry_run=dry_run, as_json=as_json, quiet=quiet)


def _search_request(
    request: SweepRequest, search: str | None, budget: int | None, held_out: int | None, *, dry_run: bool
) -> SearchRequest | None:
    from prune_cli.errors import RequestError
    from prune_cli.sweeps.search_request import DEFAULT_BUDGET, DEFAULT_HELD_OUT, SearchRequest

    if search is None:
        if budget is not None or held_out is not None:
            raise RequestError("--budget and --held-out belong to --search random or evolution: say which, or neither.")
        return None
    if dry_run:
        raise RequestError("--dry-run tells about a grid: leave out --search.")
    wanted = SearchRequest(
        request,
        options.checked_later(search),
        DEFAULT_BUDGET if budget is None else budget,
        DEFAULT_HELD_OUT if held_out is None else held_out,
    )
    wanted.check()
    return wanted


def _search(request: SearchRequest, log_file: Path | None, *, as_json: bool, quiet: bool) -> None:
    from prune_cli.commands.log_file import progress_on
    from prune_cli.sweeps.render import show_search
    from prune_cli.sweeps.search_run import search

    with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
        report = search(request, progress)
    show = partial(show_search, report=report)
    options.print_result(report.to_json, as_json=as_json, quiet=quiet, show=show)


def _run(request: SweepRequest, log_file: Path | None, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    from prune_cli.commands.log_file import progress_on
    from prune_cli.sweeps.estimate import estimate
    from prune_cli.sweeps.render import show_estimate, show_sweep
    from prune_cli.sweeps.run import sweep

    with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
        if dry_run:
            plan = estimate(request, progress)
            to_json, show = plan.to_json, partial(show_estimate, plan=plan)
        else:
            report = sweep(request, progress)
            to_json, show = report.to_json, partial(show_sweep, report=report)
    options.print_result(to_json, as_json=as_json, quiet=quiet, show=show)
