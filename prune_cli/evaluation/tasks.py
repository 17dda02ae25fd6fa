"""`prune-cli eval --tasks`: the built-in task by ourselves, all others by the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from prune_cli.engine.activation_budget import Batching
from prune_cli.engine.evaluate import mean, standard_error
from prune_cli.engine.open_model import pick_batch_size, pick_device
from prune_cli.errors import RequestError
from prune_cli.evaluation import builtin_task
from prune_cli.evaluation.builtin_task import Item, builtin_items
from prune_cli.evaluation.choices import answered_right
from prune_cli.evaluation.harness import harness_scores
from prune_cli.evaluation.perplexity import open_evaluated
from prune_cli.evaluation.requests import EvaluationRequest, TasksRequest
from prune_cli.model.architecture import load_tokenizer
from prune_cli.progress import Progress, Silent
from prune_cli.report.task_scores import TaskScore, TaskScores, recovery_error

_TOKENS = 192  # about what an item of the built-in task has


def measure_tasks(request: TasksRequest, progress: Progress | None = None) -> TaskScores:
    """Score all tasks. Raises RequestError where a task or the harness is missing, PruneError where one fails."""
    progress = progress or Silent()
    request.check()
    device = pick_device(request.device)
    names: list[str] = []
    scores: list[TaskScore] = []
    dtype = ""
    if builtin_task.NAME in request.tasks:
        score, dtype = _builtin(request, progress)
        scores.append(score)
        names.append(f"the built-in task of prune-cli (sha256 {builtin_task.SHA256[:12]}…)")
    others = tuple(name for name in request.tasks if name != builtin_task.NAME)
    if others:
        name, found, dtype = harness_scores(replace(request, tasks=others), progress)
        names.append(name)
        scores += found
    measured_by = " and ".join(names)
    return TaskScores(measured_by, request.model, request.against, request.limit, str(device), dtype, tuple(scores))


@torch.no_grad()
def _builtin(request: TasksRequest, progress: Progress) -> tuple[TaskScore, str]:
    """The built-in task's score, and the dtype of the forward pass."""
    items = builtin_items()[: request.limit]
    given = [request.model] if request.against is None else [request.model, request.against]
    results: list[list[float]] = []
    dtype = ""
    for name in given:
        right, dtype = _answers(name, request, items, progress)
        results.append(right)
    ours, theirs = results[0], results[1] if len(results) > 1 else None
    return paired_score(ours, theirs), dtype


def _answers(given: str, request: TasksRequest, items: Sequence[Item], progress: Progress) -> tuple[list[float], str]:
    """1 for each item that the model `given` answers right, else 0."""
    device = pick_device(request.device)
    revision = request.revision if given == request.model else None
    asked = EvaluationRequest(given, "", dtype=request.dtype, trust_remote_code=request.trust_remote_code)
    source, model = open_evaluated(given, revision, asked, device)
    tokenizer = load_tokenizer(source.folder, request.trust_remote_code)
    if tokenizer is None:
        raise RequestError(f"{given} has no tokenizer, and tasks are texts: add the tokenizer's files to its folder.")
    progress.stage(f"Task builtin, {given}", len(model.blocks))
    batching = Batching(pick_batch_size(request.batch_size, device, _TOKENS))
    right = answered_right(model, tokenizer, items, batching, progress)
    return [float(each) for each in right], str(model.dtype).removeprefix("torch.")


def paired_score(ours: Sequence[float], theirs: Sequence[float] | None) -> TaskScore:
    """Accuracy over the same items; what both models answer alike makes the ratio surer."""
    score, error = mean(ours), standard_error(ours)
    other = other_error = ratio = ratio_error = None
    if theirs is not None:
        other, other_error = mean(theirs), standard_error(theirs)
        ratio = score / other if other else None
        ratio_error = recovery_error(score, error, other, other_error, _covariance_of_means(ours, theirs))
    return TaskScore(
        task=builtin_task.NAME,
        metric="accuracy",
        score=score,
        standard_error=error,
        against=other,
        against_standard_error=other_error,
        difference=score - other if other is not None else None,
        higher_is_better=True,
        examples=len(ours),
        shots=0,
        recovery=ratio,
        recovery_standard_error=ratio_error,
    )


def _covariance_of_means(ours: Sequence[float], theirs: Sequence[float]) -> float:
    if len(ours) < 2:
        return 0.0
    middle, other = mean(ours), mean(theirs)
    products = [(a - middle) * (b - other) for a, b in zip(ours, theirs, strict=True)]
    return sum(products) / (len(ours) - 1) / len(ours)
