"""The model card, README.md of the output: metadata that the hub reads, and what a person must know. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from prune_cli.checkpoint.file_names import SOURCE_CARD
from prune_cli.errors import one_line
from prune_cli.report.continuations import as_markdown
from prune_cli.report.figures import FIGURES, OF_THE_RUN, figures_of
from prune_cli.report.format import method_name, table, text_name
from prune_cli.report.html.summary import exact_request, tell
from prune_cli.report.loading_section import Form, loading_section
from prune_cli.report.task_scores import TaskScores
from prune_cli.report.tasks import tasks_as_markdown
from prune_cli.request.command_line import command_of

if TYPE_CHECKING:
    from prune_cli.report.types import Report

# Of what the source's card says, this stays true of the pruned model.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_OPENREVIEW = re.compile(r"openreview (\w+)")


def metadata_of(card: str) -> dict[str, Any]:
    """The YAML at the head of a card; raises ValueError where it is none."""
    match = _FRONT.match(card)
    if match is None:
        return {}
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    if data is not None and not isinstance(data, dict):
        raise ValueError("it is no mapping")
    return data or {}


@dataclass(frozen=True)
class SourceCard:
    """The card of what was pruned; `problem` says why its metadata could not be read."""

    there: bool
    metadata: Mapping[str, Any]
    problem: str | None = None


def read_card(path: Path) -> SourceCard:
    """The card in the file `path`, if there is one."""
    if not path.is_file():
        return SourceCard(False, {})
    try:
        return SourceCard(True, metadata_of(path.read_text(encoding="utf-8", errors="replace")))
    except ValueError as error:
        return SourceCard(True, {}, f"The metadata of the source's card cannot be read ({error}).")


def card_of(report: Report, source: SourceCard) -> str:
    """The card of what `report` describes; `source` is the card of what was pruned."""
    front = yaml.safe_dump(_metadata(report, source.metadata), sort_keys=False, allow_unicode=True, width=10_000)
    parts = [
        f"---\n{front}---",
        _title(report),
        *(f"> **Warning:** {warning}" for warning in warnings_of(source, report.model.name)),
        _measured(report),
        *([tasks_as_markdown(report.tasks)] if report.tasks is not None else []),
        *([as_markdown(report.continuations)] if report.continuations else []),
        loading_section(_form(report), report.model.architecture),
        _method(report),
        _repeat(report),
        _limits(report),
        "## Source\n\n" + " ".join(_about_source(source)),
    ]
    return "\n\n".join(parts) + "\n"


def warnings_of(source: SourceCard, name: str) -> list[str]:
    """What a person must settle before a model made of `name` is published."""
    data = source.metadata
    warnings = [] if source.problem is None else [source.problem]
    if data.get("license") in (None, "unknown"):
        warnings.append(f"The licence of {name} is not known: its card names none. Find out if it may be passed on.")
    if any(key.startswith("extra_gated_") for key in data):
        warnings.append(f"{name} is gated: who publishes this model must see that the source's conditions are kept.")
    return warnings


def inherited(source: Mapping[str, Any]) -> dict[str, Any]:
    """What stays true of a model made of the one whose card has the metadata `source`."""
    return {key: source[key] for key in _INHERITED if source.get(key) not in (None, "", [])}


def _metadata(report: Report, source: Mapping[str, Any]) -> dict[str, Any]:
    data = inherited(source)
    if report.model.revision is not None:
        # Of adapter, merge, quantized and finetune, the hub's four relations, only the last is a whole model of the
        # same precision with other weights. Without a hub id there is no base_model to relate to.
        data |= {"base_model": report.model.given, "base_model_relation": "finetune"}
    data.setdefault("pipeline_tag", "text-generation")
    data |= {"library_name": "transformers", "tags": _tags(report)}
    return data | _results(report)


def _results(report: Report) -> dict[str, Any]:
    """What was measured, in the form that the hub shows beside the model."""
    results = []
    if report.evaluation is not None:
        source = text_name(report.evaluation.text)
        measured = (("pruned", report.evaluation.after), ("dense", report.evaluation.before))
        metrics = [
            {"type": "perplexity", "name": f"perplexity, {which}", "value": e.perplexity} for which, e in measured
        ]
        results.append(_result(source, metrics))
    if report.tasks is not None:
        results += _task_results(report.tasks)
    if not results:
        return {}
    name = report.model.name.rpartition("/")[2]
    return {"model-index": [{"name": f"{name}, {method_name(report)}", "results": results}]}


def _task_results(tasks: TaskScores) -> list[dict[str, Any]]:
    return [
        _result(
            each.task,
            [
                {"type": each.metric, "name": f"{each.metric}, {which}", "value": value}
                for which, value in (("pruned", each.score), ("dense", each.against))
                if value is not None
            ],
        )
        for each in tasks.scores
    ]


def _result(data: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": "text-generation"}, "dataset": {"type": data, "name": data}, "metrics": metrics}


def _tags(report: Report) -> list[str]:
    patterns = {tensor.pattern for tensor in report.tensors if tensor.pattern and tensor.n_of_m}
    methods = report.method.name.split(" + ")
    kinds = [
        *(["sparse"] if report.totals.pruned_parameters else []),
        *(["structured"] if report.structure else []),
    ]
    return list(dict.fromkeys(["pruned", *kinds, *methods, *sorted(patterns), "prune-cli"]))


def _title(report: Report) -> str:
    name, revision = report.model.given, report.model.revision
    source = f"[{name}](https://huggingface.co/{name}) (commit `{revision}`)" if revision else f"`{report.model.name}`"
    return (
        f"# {report.model.name.rpartition('/')[2]}, pruned with {method_name(report)}\n\n"
        f"This is {source}, pruned in one shot, without training. {' '.join(tell(report, '').lead)}"
    )


def _measured(report: Report) -> str:
    # What the run itself took says nothing about the model.
    figures = [figure for figure in figures_of(report) if figure.name not in OF_THE_RUN]
    evaluation = report.evaluation
    note = "Its quality was not measured."
    if evaluation is not None:
        text = evaluation.text
        note = f"Measured over {text.samples} windows of {text.seq_len} tokens: {evaluation.protocol}."
    return f"## Measured\n\n{table(FIGURES, [figure.cells() for figure in figures])}\n\n{note}\n\n{report.gain}"


def _form(report: Report) -> Form:
    if not report.output.dense_files:
        return "dense"
    return "self-contained" if report.request.self_contained else "sparse"


def _method(report: Report) -> str:
    method, calibration = report.method, report.calibration
    lines = [f"{method_name(report)[0].upper()}{method_name(report)[1:]}: {method.summary}.", ""]
    lines += [f"- {_linked(paper)}" for paper in dict.fromkeys(method.papers)]
    if calibration is not None:
        windows = f"{calibration.samples} windows of {calibration.seq_len} tokens"
        lines.append(f"- calibrated on {text_name(calibration)}: {windows}")
    if report.allocation is not None and report.allocation.strategy != "uniform":
        lines.append(f"- sparsity spread over the tensors: {report.allocation.strategy}")
    return "## Method\n\n" + "\n".join(lines)


def _linked(paper: str) -> str:
    paper = _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    return _OPENREVIEW.sub(r"[openreview \1](https://openreview.net/forum?id=\1)", paper)


def _repeat(report: Report) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report.environment.versions.items())
    model = report.model.given if report.model.revision else report.model.name
    command = command_of(replace(exact_request(report), model=model, out=Path("OUT")))
    return (
        f"## Repeat it\n\n```sh\n{command}\n```\n\nWith {versions}. Every tensor, setting and hash: "
        "`prune_report.json`, and as a page `prune_report.html`."
    )


def _limits(report: Report) -> str:
    kept = sum(tensor.action == "kept" for tensor in report.tensors)
    lines = [
        f"- {kept} of {len(report.tensors)} tensors were kept as they are (embeddings, norms and the like).",
        "- Nothing was trained after pruning. What was measured stands above; what the source's card says of its "
        "benchmarks, safety and biases was not measured again, and may no longer hold.",
        *(f"- {warning}" for warning in report.warnings),
    ]
    return "## Limits\n\n" + "\n".join(lines)


def _about_source(source: SourceCard) -> Iterator[str]:
    licence: Any = source.metadata.get("license_name") or source.metadata.get("license")
    if licence is not None:
        names: Sequence[Any] = licence if isinstance(licence, list) else [licence]
        yield f"Licence: {', '.join(map(str, names))}, as of the source; its conditions hold for this model too."
    if source.there:
        yield f"The source's own card is kept: [{SOURCE_CARD}]({SOURCE_CARD})."
    else:
        yield "The source came without a card."
