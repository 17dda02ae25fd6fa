"""`prune-cli prune`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands import prune_options as its
from prune_cli.commands.error_handling import report_failures
from prune_cli.errors import RequestError
from prune_cli.ranks.environment import SILENCE_SECONDS, is_first, process_count

if TYPE_CHECKING:
    from prune_cli.request.request import PruneRequest


def prune(
    context: typer.Context,
    model: its.Model = None,
    out: its.Out = None,
    recipe: its.Recipe = None,
    save_recipe: its.SaveRecipe = None,
    config: its.Config = None,
    preset: its.Preset = None,
    method: its.Method = None,
    sparsity: its.Sparsity = None,
    pattern: its.Pattern = None,
    allocate: its.Allocate = None,
    refine: its.Refine = None,
    reconstruct: its.Reconstruct = False,
    match_blocks: its.MatchBlocks = None,
    option: its.Option = None,
    include: its.Include = None,
    exclude: its.Exclude = None,
    allow_unsupported: its.AllowUnsupported = False,
    drop_extra_heads: its.DropExtraHeads = False,
    calibration: its.Calibration = None,
    samples: its.Samples = None,
    seq_len: options.SeqLen = None,
    seed: its.Seed = 0,
    calibrate_by: its.CalibrateBy = "sublayer",
    target: its.Target = None,
    self_calibration: its.SelfCalibration = None,
    evaluation: its.Evaluation = None,
    eval_windows: its.EvalWindows = None,
    generate: its.Generate = None,
    statistics: its.Statistics = None,
    save_statistics: its.SaveStatistics = None,
    compare_calibration: its.CompareCalibration = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = "auto",
    limit_memory: options.LimitMemory = None,
    devices: options.Devices = None,
    rank_timeout: options.RankTimeout = SILENCE_SECONDS,
    into: its.Into = "dense",
    self_contained: its.SelfContained = False,
    packed: its.Packed = None,
    text_only: its.TextOnly = False,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_changed_inputs: options.AllowChanged = False,
    resume: its.Resume = False,
    overwrite: its.Overwrite = False,
    keep_list_only: its.KeepListOnly = False,
    dry_run: its.DryRun = False,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Prune MODEL and write OUT with a report.

    The linear layers of the decoder blocks are pruned; embeddings, output head, norms, routers and biases stay.
    Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted (continue with --resume).
    """
    from prune_cli.preflight.requests import check_prune
    from prune_cli.request.request import check_even, check_list_only

    with report_failures(as_json=as_json, verbose=verbose):
        request, words = _request(context, recipe, save_recipe, config)
    with report_failures(as_json=as_json, verbose=verbose, out=request.out):
        if keep_list_only:
            if process_count() > 1:
                raise RequestError("--keep-list-only runs in one process: start it without torchrun or the like.")
            check_list_only(request)
        elif not dry_run:
            check_even(request)
        check_prune(request, writes=not keep_list_only)
        if not dry_run:
            options.on_devices(devices, request.device)
        if request.config is not None and not quiet and is_first():
            typer.echo(f"Options from {request.config}", err=True)
        options.begin((request.model,), verbose=verbose, quiet=quiet)
        if dry_run:
            revision, inputs = _tell(request, as_json=as_json, quiet=quiet), {}
        elif keep_list_only:
            revision, inputs = _list(request, log_file, as_json=as_json, quiet=quiet), {}
        else:
            told = {"as_json": as_json, "quiet": quiet, "verbose": verbose}
            revision, inputs = _run(request, log_file, rank_timeout, **told)
        if save_recipe is not None and is_first():
            from prune_cli.recipes.writing import write_recipe

            write_recipe(save_recipe, request, words, revision, inputs)


def _request(
    context: typer.Context, recipe_file: Path | None, save_recipe: Path | None, config_file: str | None
) -> tuple[PruneRequest, Collection[str]]:
    """The checked request, and the names of the fields that were said. Typer's context knows them from defaults."""
    from prune_cli.commands.merge_options import explicit_options, merged
    from prune_cli.recipes.config_file import find_config
    from prune_cli.recipes.reading import is_report, read_recipe, with_places
    from prune_cli.recipes.writing import check_recipe_path
    from prune_cli.request.request import PruneRequest

    explicit = {name: value for name, value in explicit_options(context).items() if name != "config"}
    recipe = read_recipe(recipe_file) if recipe_file is not None else None
    repeats = recipe_file is not None and is_report(recipe_file)
    # A report repeats its run, whatever is usual here today.
    config = None if repeats and config_file is None else find_config(config_file, Path.cwd())
    of_recipe, of_config = recipe.values if recipe else {}, config.values if config else {}
    with with_places(config, {**of_recipe, **explicit}), with_places(recipe, explicit):
        values = merged((of_config, of_recipe, explicit))
        request = PruneRequest(**{**values, "config": str(config.path) if config else None})
        request.check()
    if save_recipe is not None and is_first():
        check_recipe_path(save_recipe, overwrite=request.overwrite)
    return request, [*of_config, *of_recipe, *explicit]


def _tell(request: PruneRequest, *, as_json: bool, quiet: bool) -> str | None:
    """Shows the plan; returns the commit of a hub model."""
    from prune_cli.commands.terminal import show_dry_run, show_structured_dry_run
    from prune_cli.unstructured.dry_run import dry_run

    if request.is_structured:
        from prune_cli.structured.dry_run import dry_run_structured

        smaller = dry_run_structured(request)
        show = partial(show_structured_dry_run, plan=smaller)
        options.print_result(smaller.to_json, as_json=as_json, quiet=quiet, show=show)
        return smaller.revision
    plan = dry_run(request)
    options.print_result(plan.to_json, as_json=as_json, quiet=quiet, show=lambda console: show_dry_run(console, plan))
    return plan.revision


def _list(request: PruneRequest, log_file: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Writes which experts stay, and says how many do."""
    from prune_cli.commands.log_file import progress_on
    from prune_cli.commands.terminal import show_expert_list
    from prune_cli.structured.moe.list_only import list_experts

    with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
        written = list_experts(request, progress)
    options.print_result(
        written.to_json, as_json=as_json, quiet=quiet, show=lambda console: show_expert_list(console, written)
    )


def _run(
    request: PruneRequest, log_file: Path | None, rank_timeout: float, *, as_json: bool, quiet: bool, verbose: bool
) -> tuple[str | None, Mapping[str, str]]:
    """Prunes and shows the report; returns the commit of a hub model, and the hashes of all that was read."""
    from prune_cli.commands.log_file import progress_on
    from prune_cli.commands.terminal import show_report
    from prune_cli.run import prune

    with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
        report = prune(request, progress, rank_timeout=rank_timeout)
    options.print_result(
        report.to_json,
        as_json=as_json,
        quiet=quiet,
        show=lambda console: show_report(console, report, verbose=verbose),
    )
    return report.model.revision, report.inputs
