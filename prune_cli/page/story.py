"""From saved reports to what the page tells: sentences, figures and rows, all of them text. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_cli.markdown import percent
from prune_cli.repeat import command_of

_MB, _GB = 1e6, 1e9


@dataclass(frozen=True)
class Figure:
    """One number of a run; `before` and `change` (in words) where there is something to compare with."""

    name: str
    after: str
    before: str | None = None
    change: str | None = None


@dataclass(frozen=True)
class Run:
    """What one report tells. `papers` and the rows are (name, text) pairs."""

    label: str
    title: str
    lead: Sequence[str]
    figures: Sequence[Figure]
    gain: str
    warnings: Sequence[str]
    command: str
    papers: Sequence[str]
    kept: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, str]]


def tell(report: Mapping[str, Any], label: str) -> Run:
    """The story of one valid report (`read_report`), called `label` where several stand side by side."""
    return Run(
        label=label,
        title=f"{model_name(report)} pruned with {report['method']['name']}",
        lead=_lead(report),
        figures=_figures(report),
        gain=report["gain"],
        warnings=list(report["warnings"]),
        command=command_of(exact_request(report)),
        papers=list(dict.fromkeys(report["method"]["papers"])),
        kept=_kept(report),
        settings=_settings(report),
        files=_files(report),
    )


def side_by_side(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Each figure that any run has, with its text for every run."""
    names = dict.fromkeys(figure.name for run in runs for figure in run.figures)
    found = [{figure.name: figure for figure in run.figures} for run in runs]
    return [(name, [_in_a_line(figures.get(name)) for figures in found]) for name in names]


def _in_a_line(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    before = f"{figure.before} → " if figure.before else ""
    change = f" ({figure.change})" if figure.change else ""
    return before + figure.after + change


def labels_of(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each: the folder it was written to, numbered where two are alike."""
    names = [report["output"]["folder"].rstrip("/").rpartition("/")[2] or "report" for report in reports]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return labels


def remarks_on(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What forbids to compare some of the figures."""
    remarks = []
    if len({_key(report["model"]["files"]) for report in reports}) > 1:
        remarks.append("The reports are of different models: compare how much changed, not the values.")
    texts = {report["evaluation"]["text"]["sha256"] for report in reports if report["evaluation"] is not None}
    if len(texts) > 1:
        remarks.append("Perplexity was measured on different texts: those values cannot be compared.")
    calibrations = {report["calibration"]["sha256"] for report in reports if report["calibration"] is not None}
    if len(calibrations) > 1:
        remarks.append("Output errors were measured on different calibration texts: they compare only roughly.")
    return remarks


def _key(files: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(files.items()))


def model_name(report: Mapping[str, Any]) -> str:
    """A hub id as it is; of a folder its last part."""
    given = report["model"]["given"]
    return given if report["model"]["revision"] else given.rstrip("/").rpartition("/")[2]


def text_name(text: Mapping[str, Any]) -> str:
    """A source as it was given, but of a path only its last part."""
    source = text["source"]
    return source.rpartition("/")[2] or source if source.startswith(("/", "./", "../", "~")) else source


def change_of(before: float, after: float) -> str:
    """The relative change of a positive number: '+16.5 %', or 'as before' where nothing of it would be seen."""
    change = 100 * (after / before - 1)
    return "as before" if abs(change) < 0.05 else f"{change:+.1f} %"


def size(count: float) -> str:
    return f"{count / _GB:.2f} GB" if count >= _GB else f"{count / _MB:.1f} MB"


def count_of(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f}"


def _lead(report: Mapping[str, Any]) -> list[str]:
    totals, tensors = report["totals"], report["tensors"]
    pruned = sum(tensor["action"] == "pruned" for tensor in tensors)
    lead = [
        f"{percent(totals['sparsity_of_pruned'])} of the weights in the {pruned} pruned tensors are zero, "
        f"{percent(totals['sparsity_of_model'])} of the whole model."
    ]
    evaluation = report["evaluation"]
    if evaluation is None:
        lead.append("What that costs was not measured: --eval SOURCE of prune, or prune-cli eval, does.")
    else:
        before, after = evaluation["before"]["perplexity"], evaluation["after"]["perplexity"]
        lead.append(
            f"Perplexity on {text_name(evaluation['text'])} went from {before:.2f} to {after:.2f} "
            f"({change_of(before, after)})."
        )
    before, after = totals["bytes_before"], totals["bytes_after"]
    change = change_of(before, after)
    lead.append(
        f"The weights take {size(after)} on disk, "
        + ("as before." if change == "as before" else f"{size(before)} before ({change}).")
    )
    return lead


def _figures(report: Mapping[str, Any]) -> list[Figure]:
    totals = report["totals"]
    zeros = round(totals["sparsity_of_model"] * totals["parameters"])
    parameters = totals["parameters"]
    return [
        Figure("Zeros in the pruned tensors", percent(totals["sparsity_of_pruned"])),
        Figure("Weights that are not zero", count_of(parameters - zeros), change=f"of {count_of(parameters)}"),
        _figure_of_bytes(totals),
        *_figures_of_quality(report["evaluation"]),
        Figure("Time of the run", f"{report['seconds']:.1f} s"),
        Figure("Peak memory", _memory(report)),
    ]


def _figures_of_quality(evaluation: Mapping[str, Any] | None) -> list[Figure]:
    if evaluation is None:
        return []
    before, after = evaluation["before"], evaluation["after"]
    perplexity = change_of(before["perplexity"], after["perplexity"])
    return [
        Figure(
            f"Perplexity on {text_name(evaluation['text'])}",
            f"{after['perplexity']:.2f}",
            f"{before['perplexity']:.2f}",
            perplexity,
        ),
        Figure(
            "Loss, nats per token",
            f"{after['loss']:.4f}",
            f"{before['loss']:.4f}",
            f"{after['loss'] - before['loss']:+.4f}",
        ),
    ]


def _figure_of_bytes(totals: Mapping[str, Any]) -> Figure:
    before, after = totals["bytes_before"], totals["bytes_after"]
    return Figure("Weights on disk", size(after), size(before), change_of(before, after))


def _memory(report: Mapping[str, Any]) -> str:
    host = size(report["peak_host_bytes"])
    device = report["peak_device_bytes"]
    return host if device is None else f"{host}, device {size(device)}"


def exact_request(report: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, with the commit that was found, and without what belongs to that one run."""
    return {
        **report["request"],
        "revision": report["model"]["revision"] or report["request"].get("revision"),
        "resume": False,
        "overwrite": False,
    }


def _kept(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    reasons = Counter(tensor["reason"] for tensor in report["tensors"] if tensor["action"] == "kept")
    return [(reason, str(number)) for reason, number in sorted(reasons.items())]


def _settings(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    environment, model = report["environment"], report["model"]
    calibration = report["calibration"]
    rows = [
        ("Model", model["given"] + (f" at {model['revision']}" if model["revision"] else "")),
        ("Architecture", model["architecture"]),
        ("Method", f"{report['method']['name']}: {report['method']['summary']}"),
        ("Options", ", ".join(f"{key} = {value}" for key, value in report["method"]["options"].items()) or "none"),
        ("Allocation", report["allocation"]["strategy"]),
        ("Calibration", "none needed" if calibration is None else _text(calibration)),
    ]
    if report["evaluation"] is not None:
        rows.append(("Evaluation", f"{_text(report['evaluation']['text'])} {report['evaluation']['protocol']}"))
    rows += [
        ("Made", f"{report['created']} by {report['tool']['name']} {report['tool']['version']}"),
        ("Device", f"{environment['device']}, {environment['compute_dtype']}, {environment['threads']} threads"),
        ("System", f"{environment['platform']}, Python {environment['python']}"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in environment["versions"].items())),
    ]
    return rows


def _text(text: Mapping[str, Any]) -> str:
    return f"{text['source']}: {text['samples']} windows of {text['seq_len']} tokens. {text['protocol']}"


def _files(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return sorted(report["output"]["files"].items())
