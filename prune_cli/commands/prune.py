"""`prune-cli prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands import prune_options as its
from prune_cli.failures import told_failures

if TYPE_CHECKING:
    from prune_cli.request import PruneRequest


def prune(
    model: options.Model,
    out: its.Out,
    preset: its.Preset = None,
    method: its.Method = None,
    sparsity: its.Sparsity = None,
    pattern: its.Pattern = None,
    allocate: its.Allocate = None,
    refine: its.Refine = None,
    reconstruct: its.Reconstruct = False,
    option: its.Option = None,
    include: its.Include = None,
    exclude: its.Exclude = None,
    allow_unsupported: its.AllowUnsupported = False,
    calibration: its.Calibration = None,
    samples: its.Samples = None,
    seq_len: options.SeqLen = None,
    seed: its.Seed = 0,
    calibrate_by: its.CalibrateBy = "sublayer",
    target: its.Target = None,
    evaluation: its.Evaluation = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    resume: its.Resume = False,
    overwrite: its.Overwrite = False,
    dry_run: its.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Prune MODEL and write OUT with a report.

    The linear maps of the decoder blocks are pruned; embeddings, output head, norms, routers and biases stay.
    Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted (continue with --resume).
    """
    with told_failures(as_json=as_json, verbose=verbose, out=out):
        from prune_cli.presets import with_preset
        from prune_cli.request import PruneRequest

        said = with_preset(
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
                "options": options.key_values(option or []),
                "calibration": calibration,
                "samples": samples,
                "seq_len": seq_len,
                "seed": seed,
                "device": device,
                "dtype": options.checked_later(dtype),
                "batch_size": options.batch_size_of(batch_size),
                "include": tuple(include or ()),
                "exclude": tuple(exclude or ()),
                "calibrate_by": options.checked_later(calibrate_by),
                "target": target,
                "eval": evaluation,
                "resume": resume,
                "overwrite": overwrite,
                "allow_unsupported": allow_unsupported,
                "trust_remote_code": trust_remote_code,
                "revision": revision,
            }
        )
        request = PruneRequest(**said)
        request.check()
        options.calm_libraries(verbose=verbose, quiet=quiet)
        if dry_run:
            _tell(request, as_json=as_json, quiet=quiet)
        else:
            _run(request, as_json=as_json, quiet=quiet, verbose=verbose)


def _tell(request: PruneRequest, *, as_json: bool, quiet: bool) -> None:
    from prune_cli.estimate import dry_run
    from prune_cli.render import show_dry_run

    plan = dry_run(request)
    options.print_result(plan.to_json(), as_json=as_json, quiet=quiet, show=lambda console: show_dry_run(console, plan))


def _run(request: PruneRequest, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    from prune_cli.progress import progress_on
    from prune_cli.render import show_report
    from prune_cli.run import prune

    with progress_on(Console(stderr=True), quiet=quiet) as progress:
        report = prune(request, progress)
    options.print_result(
        report.to_json(),
        as_json=as_json,
        quiet=quiet,
        show=lambda console: show_report(console, report, verbose=verbose),
    )
