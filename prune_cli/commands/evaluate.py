"""`prune-cli eval`."""

from __future__ import annotations

import json
import logging
import os
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands.error_handling import report_failures
from prune_cli.errors import RequestError
from prune_cli.ranks.environment import SILENCE_SECONDS, process_count

if TYPE_CHECKING:
    from prune_cli.evaluation.perplexity import EvaluationResult
    from prune_cli.report.task_scores import TaskScores

_TASKS = "Tasks"


def evaluate(
    model: options.Model,
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text for perplexity, as for --calibration of prune.")
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The dense model to compare with.")] = None,
    eval_windows: Annotated[
        int | None,
        typer.Option("--eval-windows", "--samples", help="So many windows, drawn with --seed [default: all]."),
    ] = None,
    seq_len: options.SeqLen = None,
    seed: Annotated[int, typer.Option(help="Of the windows that are drawn.", rich_help_panel=options.TEXT)] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With commas between: builtin (passages of the builtin text, no network), or those of the "
            "lm-evaluation-harness, as arc_easy,hellaswag or mmlu_*, which need pip install 'prune-cli[eval]'.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first examples of each task [default: all].", rich_help_panel=_TASKS)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with task YAMLs of yours.", rich_help_panel=_TASKS)
    ] = None,
    add_to_report: Annotated[
        bool,
        typer.Option(
            "--add-to-report",
            help="Write the scores into report, page and card in MODEL's folder, which prune made.",
            rich_help_panel=_TASKS,
        ),
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = "auto",
    limit_memory: options.LimitMemory = None,
    devices: options.Devices = None,
    rank_timeout: options.RankTimeout = SILENCE_SECONDS,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_changed_inputs: options.AllowChanged = False,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Perplexity of MODEL on a text, or its scores on tasks, or both; against a dense model also the differences.

    With --data the text is cut into consecutive windows of --seq-len tokens; each is predicted on its own. One block of
    weights is in memory at a time. Against a dense model: KL divergence, agreement and the difference of the losses.

    --tasks builtin asks which of four passages goes on from a piece of the builtin text, one block in memory. All other
    tasks are the lm-evaluation-harness's, which runs as it is, with the whole model in memory.

    Examples:

    prune-cli eval ./pruned --against ./dense --data wikitext2

    prune-cli eval ./pruned --against ./dense --tasks arc_easy,hellaswag --limit 200
    """
    with report_failures(as_json=as_json, verbose=verbose):
        _check(
            data,
            tasks,
            {"--eval-windows": eval_windows, "--seq-len": seq_len, "--limit-memory": limit_memory},
            {"--limit": limit, "--include-path": include_path, "--add-to-report": add_to_report or None},
        )
        if not verbose:
            _calm_harness()
        from prune_cli.commands.log_file import progress_on
        from prune_cli.evaluation.requests import EvaluationRequest, TasksRequest
        from prune_cli.preflight.requests import check_models
        from prune_cli.report.files import add_tasks

        shared = {
            "model": model,
            "against": against,
            "device": device,
            "dtype": options.checked_later(dtype),
            "batch_size": options.batch_size_of(batch_size),
            "trust_remote_code": trust_remote_code,
            "revision": revision,
        }
        asked_tasks = asked_text = result = scores = None
        if tasks is not None:
            names = tuple(name.strip() for name in tasks.split(","))
            asked_tasks = TasksRequest(tasks=names, limit=limit, include_path=include_path, **shared)
            asked_tasks.check()
        if data is not None:
            own = {"eval_windows": eval_windows, "seq_len": seq_len, "seed": seed, "limit_memory": limit_memory}
            asked_text = EvaluationRequest(data=data, allow_changed_inputs=allow_changed_inputs, **own, **shared)
            asked_text.check()
        check_models([(model, revision), *([(against, None)] if against is not None else [])], [(data, None)], seq_len)
        if add_to_report:
            _check_report(model, against)
        options.on_devices(devices, device)
        options.begin([model] if against is None else [model, against], verbose=verbose, quiet=quiet)
        from prune_cli.commands.terminal import show_evaluation, show_tasks
        from prune_cli.evaluation.perplexity import measure
        from prune_cli.evaluation.tasks import measure_tasks

        with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
            if asked_tasks is not None:
                # The harness draws bars of its own, whatever it is told.
                with redirect_stderr(StringIO()) if quiet else nullcontext():
                    scores = measure_tasks(asked_tasks, progress)
            if asked_text is not None:
                result = measure(asked_text, progress, rank_timeout=rank_timeout)

        if add_to_report and scores is not None:
            add_tasks(Path(model).expanduser(), scores)

        def show(console: Console) -> None:
            if result is not None:
                show_evaluation(console, result)
            if scores is not None:
                show_tasks(console, scores)
            if add_to_report:
                console.print(f"Added to {model}; prune_report.html there shows it.", highlight=False, soft_wrap=True)

        options.print_result(lambda: _document(result, scores), as_json=as_json, quiet=quiet, show=show)


def _calm_harness() -> None:
    """Silence its log and its bars, which are read when tqdm is imported; ours tells how many tasks are done."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _check(data: str | None, tasks: str | None, of_data: dict[str, object], of_tasks: dict[str, object]) -> None:
    """Refuse an evaluation of nothing, and options that would change nothing."""
    if data is None and tasks is None:
        raise RequestError("eval needs --data SOURCE, for perplexity, or --tasks NAMES, for scores on tasks.")
    if tasks is not None and process_count() > 1:
        raise RequestError("--tasks runs in one process: start it without torchrun, and --data by itself.")
    for owner, given, belonging in (("--data", data, of_data), ("--tasks", tasks, of_tasks)):
        for option, value in belonging.items():
            if given is None and value is not None:
                raise RequestError(f"{option} belongs to {owner}, which was not given: add it, or leave {option} out.")


def _check_report(model: str, against: str | None) -> None:
    """Refuse scores that a report has no place for, before they are measured."""
    from prune_cli.report.read import read_report

    if against is None:
        raise RequestError("--add-to-report tells how much of the dense model's scores is left: add --against DENSE.")
    if not Path(model).expanduser().is_dir():
        raise RequestError(f"--add-to-report writes into a folder, and {model} is none: give the folder of the model.")
    read_report(model)


def _document(result: EvaluationResult | None, scores: TaskScores | None) -> str:
    """One document whatever was measured: what was not is null."""
    if result is not None:
        document = asdict(result)
    else:
        assert scores is not None
        shared = ("model", "against", "device", "compute_dtype")
        document = {key: getattr(scores, key) for key in shared}
        document |= {"protocol": None, "text": None, "evaluation": None, "comparison": None, "warnings": []}
    document["tasks"] = asdict(scores) if scores is not None else None
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
