"""What rules are decided on: each figure with where it comes from, or None with what is missing. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from prune_cli.errors import RequestError
from prune_cli.report.read import SavedReport
from prune_cli.report.types import TextReport


@dataclass(frozen=True)
class Figures:
    """Figures of a model and, where a rule needs them, of the dense one; `missing` says why a figure is None.

    Perplexities and `kl` (nats per token) are on the same text. `sparsity` is that of the tensors named in words by
    `sparsity_of`. Sizes are bytes of weight files. `load_failure` is empty where loading and generating worked.
    `changed_files` are those that differ from the report. `told` are numbers that only a report tells, by their names.
    """

    perplexity: float | None = None
    dense_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    sparsity: float | None = None
    sparsity_of: str = ""
    bytes: int | None = None
    dense_bytes: int | None = None
    load_failure: str | None = None
    changed_files: Sequence[str] | None = None
    text: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, float] = field(default_factory=dict)

    def need(self, rule: str, *names: str) -> list[float]:
        """The figures called `names`; raises RequestError that says what `rule` lacks."""
        values: list[float | None] = [getattr(self, name) if name in OWN else self.told.get(name) for name in names]
        for name, value in zip(names, values, strict=True):
            if value is None:
                raise RequestError(f"{rule} cannot be decided: {self.missing.get(name, 'no report tells it')}.")
        return [value for value in values if value is not None]


OWN = {each.name for each in fields(Figures)}
_FOLDER = "give the model's folder, with --data and --against, to measure it"


def figures_of_report(saved: SavedReport) -> Figures:
    """The figures that a report states; nothing is measured."""
    evaluation, totals = saved.report.evaluation, saved.report.totals
    pruned = totals.pruned_parameters > 0
    no_evaluation = f"{saved.path} holds no perplexity (prune with --eval SOURCE); or {_FOLDER}"
    return Figures(
        perplexity=evaluation.after.perplexity if evaluation else None,
        dense_perplexity=evaluation.before.perplexity if evaluation else None,
        sparsity=totals.sparsity_of_pruned if pruned else None,
        sparsity_of="the pruned tensors",
        bytes=totals.bytes_after,
        dense_bytes=totals.bytes_before,
        text=told_text(evaluation.text) if evaluation else "",
        missing={
            "perplexity": no_evaluation,
            "dense_perplexity": no_evaluation,
            "kl": f"a report holds no KL divergence; {_FOLDER}",
            "top1": f"a report holds no agreement; {_FOLDER}",
            "sparsity": f"{saved.path} lists no tensor as pruned to a sparsity",
            "load_failure": "a report cannot be loaded; give the model's folder",
        },
    )


def told_text(text: TextReport) -> str:
    return f"{text.samples} windows of {text.seq_len} tokens of {text.source}"
