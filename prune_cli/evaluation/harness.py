"""`prune-cli eval --tasks`: scores of the lm-evaluation-harness, which is an optional extra and used as it is.

Its model is plain transformers' own, loaded whole; everything about a task (prompts, shots, metrics) is the harness's.
"""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from prune_cli.checkpoint.source import Source, resolve_model
from prune_cli.engine.open_model import pick_device, pick_dtype
from prune_cli.errors import PruneError, RequestError, one_line
from prune_cli.evaluation.requests import TasksRequest
from prune_cli.model.architecture import load_tokenizer
from prune_cli.model.open_checkpoint import open_checkpoint
from prune_cli.progress import Progress
from prune_cli.report.task_scores import TaskScore, recovery_error

INSTALL = "pip install 'prune-cli[eval]'"


@dataclass(frozen=True)
class _Loadable:
    source: Source
    dtype: torch.dtype
    device: torch.device


def harness_scores(request: TasksRequest, progress: Progress) -> tuple[str, list[TaskScore], str]:
    """Its name, all scores, the dtype. Raises RequestError where it or a task is missing, PruneError where it fails."""
    device = pick_device(request.device)
    harness = _harness()
    manager, tasks = _find_tasks(harness, request)
    models = [_open(request.model, request.revision, request, device)]
    if request.against is not None:
        models.append(_open(request.against, None, request, device))
    progress.stage(f"lm-eval: {', '.join(request.tasks)}", len(models) * len(tasks))
    results = [_run(harness, manager, tasks, model, request, progress) for model in models]
    scores = _scores(results[0], results[1] if len(results) > 1 else None)
    return f"lm-eval {version('lm-eval')}", scores, str(models[0].dtype).removeprefix("torch.")


def _open(given: str, revision: str | None, request: TasksRequest, device: torch.device) -> _Loadable:
    source = resolve_model(given, revision)
    checkpoint = open_checkpoint(source.folder)
    if load_tokenizer(source.folder, request.trust_remote_code) is None:
        raise RequestError(
            f"{given} has no tokenizer, and tasks are texts: copy the tokenizer's files into its folder."
        )
    return _Loadable(source, pick_dtype(request.dtype, device, checkpoint), device)


def _harness() -> Any:
    try:
        harness = importlib.import_module("lm_eval")
        importlib.import_module("lm_eval.tasks")
        importlib.import_module("lm_eval.models.huggingface")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise PruneError(f"lm-eval is installed but does not start ({one_line(error)}): {INSTALL}") from error
        raise RequestError(f"--tasks needs the lm-evaluation-harness, which is not installed: {INSTALL}") from error
    return harness


def _find_tasks(harness: Any, request: TasksRequest) -> tuple[Any, list[str]]:
    """The harness's own index, and the names that were asked for, globs resolved."""
    include = str(request.include_path) if request.include_path is not None else None
    try:
        manager = harness.tasks.TaskManager(include_path=include)
    except Exception as error:  # the harness's own checks of YAML files raise all kinds
        raise RequestError(f"The tasks in {include} cannot be read ({one_line(error)}): correct the YAML.") from error
    found: list[str] = []
    for name in request.tasks:
        matching = manager.match_tasks([name])
        if not matching:
            raise RequestError(
                f"--tasks names {name!r}, which lm-eval does not know: `lm-eval ls tasks` lists its own, "
                "--include-path adds a folder of yours."
            )
        found += matching
    return manager, list(dict.fromkeys(found))


def _run(
    harness: Any,
    manager: Any,
    tasks: Sequence[str],
    model: _Loadable,
    request: TasksRequest,
    progress: Progress,
) -> dict[str, Any]:
    """All tasks on one model, which is gone from memory afterwards."""
    device = model.device
    batch_size = request.batch_size if request.batch_size != "auto" or device.type == "cuda" else 1
    try:
        loaded = harness.models.huggingface.HFLM(
            pretrained=str(model.source.folder),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(device),
            batch_size=batch_size,
            trust_remote_code=request.trust_remote_code,
        )
    except Exception as error:  # whatever transformers or the harness raise
        _let_memory_errors_pass(error)
        raise PruneError(f"{model.source.given} cannot be loaded by lm-eval ({one_line(error)}).") from error
    merged: dict[str, Any] = {}
    for task in tasks:
        try:
            result = harness.simple_evaluate(
                model=loaded, tasks=[task], limit=request.limit, task_manager=manager, log_samples=False
            )
        except Exception as error:  # whatever the task, its data set or the harness raise
            _let_memory_errors_pass(error)
            raise PruneError(f"The task {task} failed on {model.source.given} ({one_line(error)}).") from error
        for key in ("results", "n-shot", "n-samples", "higher_is_better"):
            merged.setdefault(key, {}).update(result.get(key) or {})
        progress.advance()
    del loaded
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return merged


def _let_memory_errors_pass(error: Exception) -> None:
    """Out of memory has a sentence of its own, given where all commands end."""
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        raise error


def _scores(ours: Mapping[str, Any], dense: Mapping[str, Any] | None) -> list[TaskScore]:
    scores: list[TaskScore] = []
    for task, values in ours["results"].items():
        theirs = dense["results"].get(task, {}) if dense is not None else {}
        for key, value in values.items():
            metric, _, step = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not step:  # alias, sample_len and the like
                continue
            error_key = f"{metric}_stderr,{step}"
            other, error = _number(theirs.get(key)), _number(values.get(error_key))
            dense_error = _number(theirs.get(error_key))
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if step == "none" else f"{metric} ({step})",
                    score=float(value),
                    standard_error=error,
                    against=other,
                    against_standard_error=dense_error,
                    difference=float(value) - other if other is not None else None,
                    higher_is_better=(ours["higher_is_better"].get(task) or {}).get(metric),
                    examples=(ours["n-samples"].get(task) or {}).get("effective"),
                    shots=ours["n-shot"].get(task),
                    recovery=float(value) / other if other else None,
                    recovery_standard_error=recovery_error(value, error, other, dense_error) if other else None,
                )
            )
    return scores


def _number(value: Any) -> float | None:
    """The harness writes N/A where it has no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
