"""The story of a search over allocations, top to bottom."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import torch

from calibration.tokens import TokenSet
from prune_cli.checkpoint.inputs import hash_files
from prune_cli.engine.evaluate import PROTOCOL, by_tokens, mean, standard_error, summary
from prune_cli.engine.provenance import batch_size_of, environment, model_facts, text_report
from prune_cli.engine.texts import TextReader
from prune_cli.errors import RequestError
from prune_cli.model.architecture import load_tokenizer
from prune_cli.preflight.models_and_texts import open_text
from prune_cli.progress import Progress, Silent
from prune_cli.request.allocation import Allocation
from prune_cli.request.request import DEFAULT_SOURCE
from prune_cli.sweeps.curves import increases
from prune_cli.sweeps.journal import Journal
from prune_cli.sweeps.point_run import Measured, SweepTexts
from prune_cli.sweeps.request import Point
from prune_cli.sweeps.run import (
    SweepPlan,
    as_json,
    evaluate_dense,
    fingerprint,
    measure,
    plan_sweep,
    warnings_of,
    with_sampled,
)
from prune_cli.sweeps.search import Table, children, generations, random_tables, start_of_evolution
from prune_cli.sweeps.search_report import (
    ALLOCATION_JSON,
    SCHEMA_VERSION,
    SEARCH_JSON,
    Candidate,
    Result,
    SearchReport,
    verdict,
)
from prune_cli.sweeps.search_request import SearchRequest
from prune_cli.sweeps.search_stages import EVOLVING, MEASURING_BEST, SEARCHING, stages_of_search
from prune_cli.unstructured.prepare import PruningPlan
from prune_cli.version import __version__

_UNIFORM, _RANDOM, _EVOLUTION = "uniform", "random search", "evolution"
# At most this share of the calibration windows is held out where the text is short.
_SHARE_HELD_OUT = 4


@dataclass(frozen=True)
class _Judge:
    """Gives a candidate its loss on the held-out windows; each is measured once."""

    request: SearchRequest
    sweep_plan: SweepPlan
    journal: Journal
    progress: Progress

    def losses(self, tables: Sequence[Table], title: str) -> list[float]:
        points = [self.point(table) for table in tables]
        measured = measure(self.sweep_plan, points, self.journal, self.progress, title)
        windows = self.sweep_plan.texts.evaluation.windows
        return [mean(by_tokens(measured[point.key].losses, [windows])) for point in points]

    def point(self, table: Table, on: str = "held-out") -> Point:
        by_tensor = for_tensors(self.sweep_plan.plan, table)
        # With what the plan has settled of --self-calibration.
        return replace(self.sweep_plan.grid[0], allocation=by_tensor, on=on)


@torch.no_grad()
def search(request: SearchRequest, progress: Progress | None = None) -> SearchReport:
    """Search as `request` says and write OUTDIR; returns the report that is written there too.

    Candidates are judged on windows of the calibration text that are kept apart; the best of each search and the
    uniform allocation are then measured on --data. Raises what `sweep` raises.
    """
    progress = progress or Silent()
    begun = time.monotonic()
    request.check()
    final = plan_sweep(request.sweep, progress)
    judging = replace(final, texts=_held_out(request, final))
    texts, workers = (final.texts, judging.texts), len(final.plans)
    progress.expect(stages_of_search(request, final.grid[0], final.plan, *texts, workers))
    final, judging = with_sampled(final, progress), with_sampled(judging, progress)
    for warning in warnings_of(request.sweep, final):
        progress.say(f"warning: {warning}")
    files = hash_files(final.plan.checkpoint.folder, final.plan.checkpoint.files)
    shared = {**fingerprint(request.sweep, final, files), "held out": judging.texts.evaluation.sha256}
    with Journal(request.sweep.out, shared, resume=request.sweep.resume) as journal:
        dense = evaluate_dense(final, journal, progress)
        judge = _Judge(request, judging, journal, progress)
        judged = _candidates(request, judge)
        best = {_UNIFORM: judged[_RANDOM][0], **{name: min(tried, key=_loss) for name, tried in judged.items()}}
        measured = _measure_best(judge, final, best)
        found = _Found(files, dense, judged, best, measured)
        report = _report(judge, final, found, time.monotonic() - begun)
        journal.commit({SEARCH_JSON: report.to_json(), ALLOCATION_JSON: json.dumps(report.allocation, indent=1) + "\n"})
    return report


def _loss(judged: tuple[float, Table]) -> float:
    return judged[0]


def _held_out(request: SearchRequest, sweep_plan: SweepPlan) -> SweepTexts:
    """The calibration windows for judging, and those held out: drawn together, so that they do not overlap."""
    sweep, plan = request.sweep, sweep_plan.plan
    needs = bool(plan.pipeline.needs)
    samples = request.held_out if not needs else sweep.samples and sweep.samples + request.held_out
    source = open_text(DEFAULT_SOURCE if sweep.calibration is None else sweep.calibration)
    tokenizer = load_tokenizer(plan.source.folder, plan.trust_remote_code)
    tokens = TextReader(plan.model, tokenizer, sweep.seq_len, sweep.seed).read(source, "calibration", samples)
    if not needs:
        return SweepTexts(None, tokens)
    count = len(tokens.ids)
    if count < 2:
        raise RequestError(f"{tokens.source} gives one window only: a search needs one to prune and one to judge.")
    held = request.held_out if sweep.samples else min(request.held_out, max(1, count // _SHARE_HELD_OUT))
    return SweepTexts(_part(tokens, slice(0, count - held)), _part(tokens, slice(count - held, count)))


def _part(tokens: TokenSet, rows: slice) -> TokenSet:
    part = tokens.windows[rows]
    return replace(
        tokens, ids=part.ids.contiguous(), mask=part.mask, sha256=f"{tokens.sha256}[{rows.start}:{rows.stop}]"
    )


def block_counts(plan: PruningPlan) -> dict[str, int]:
    """Weights to prune per block that has any."""
    counts = {
        str(block): sum(plan.decisions[name].info.entry.count for name in plan.pruned_names(block))
        for block in range(len(plan.model.blocks))
    }
    return {block: count for block, count in counts.items() if count}


def for_tensors(plan: PruningPlan, table: Mapping[str, float]) -> dict[str, float]:
    """A table by block as one by tensor."""
    return {name: value for block, value in table.items() for name in plan.pruned_names(int(block))}


def _candidates(request: SearchRequest, judge: _Judge) -> dict[str, list[tuple[float, Table]]]:
    """Per search the candidates with their losses, each `budget` many; the first of random search is uniform."""
    counts, asked = block_counts(judge.sweep_plan.plan), request.sweep.sparsities[0]
    seed, budget = request.sweep.seed, request.budget
    tables = random_tables(counts, asked, budget, seed)
    judged = {_RANDOM: list(zip(judge.losses(tables, SEARCHING), tables, strict=True))}
    if request.strategy == "evolution":
        evolved = judged[_RANDOM][: start_of_evolution(budget)]
        for number in generations(budget):
            born = children(evolved, counts, asked, number, seed)
            title = f"{EVOLVING}, {len(evolved)} of {budget} candidates judged"
            evolved = [*evolved, *zip(judge.losses(born, title), born, strict=True)]
        judged[_EVOLUTION] = evolved
    return judged


def _measure_best(judge: _Judge, final: SweepPlan, best: Mapping[str, tuple[float, Table]]) -> dict[str, Measured]:
    """On --data, calibrated on the very windows that `prune` takes."""
    points = {name: judge.point(table, on="data") for name, (_, table) in best.items()}
    measured = measure(final, list(points.values()), judge.journal, judge.progress, MEASURING_BEST)
    return {name: measured[point.key] for name, point in points.items()}


@dataclass(frozen=True)
class _Found:
    """What a search ends with: of each search all that it `judged` and its `best`, which were also `measured`."""

    files: Mapping[str, str]
    dense: Sequence[float]
    judged: Mapping[str, Sequence[tuple[float, Table]]]
    best: Mapping[str, tuple[float, Table]]
    measured: Mapping[str, Measured]


def _report(judge: _Judge, final: SweepPlan, found: _Found, seconds: float) -> SearchReport:
    request, plan, text = judge.request, final.plan, final.texts.evaluation
    winner = min(found.judged, key=lambda name: found.best[name][0])
    loss, by_block = found.best[winner]
    table = for_tensors(plan, by_block)
    facts = {"by_block": by_block, "held_out_loss": loss}
    options = {"budget": request.budget, "held_out": request.held_out, "seed": request.sweep.seed}
    return SearchReport(
        schema_version=SCHEMA_VERSION,
        tool={"name": "prune-cli", "version": __version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        request={
            **as_json(request.sweep),
            "search": request.strategy,
            "budget": request.budget,
            "held_out": request.held_out,
        },
        environment=asdict(environment(plan, batch_size_of(plan, text))),
        model=asdict(model_facts(plan, found.files)),
        protocol=PROTOCOL,
        text=text_report(text),
        calibration=text_report(final.texts.calibration) if final.texts.calibration else None,
        held_out_windows=len(judge.sweep_plan.texts.evaluation.ids),
        method=request.point().method,
        asked_sparsity=request.sweep.sparsities[0],
        dense=summary(found.dense, text.windows),
        candidates=_message_of_candidates(found.judged),
        results=[_result(name, best, found.measured, text) for name, best in found.best.items()],
        winner=winner,
        verdict=_verdict(found.measured, text),
        allocation=Allocation(f"search: {winner}", options, table, facts).to_dict(),
        seconds=seconds,
        warnings=warnings_of(request.sweep, final),
    )


def _message_of_candidates(judged: Mapping[str, Sequence[tuple[float, Table]]]) -> list[Candidate]:
    """Each once, with the searches that it belongs to, in the order in which they were judged."""
    found: dict[tuple[float, ...], Candidate] = {}
    for name, tried in judged.items():
        for loss, table in tried:
            key = tuple(table.values())
            of = (*found[key].of, name) if key in found and name not in found[key].of else (name,)
            found[key] = Candidate(of, loss, table)
    return list(found.values())


def _result(name: str, best: tuple[float, Table], measured: Mapping[str, Measured], text: TokenSet) -> Result:
    grown = increases(measured[name].losses, measured[_UNIFORM].losses, text)
    evaluation = summary(measured[name].losses, text.windows)
    return Result(name, best[0], evaluation, mean(grown), standard_error(grown), best[1])


def _verdict(measured: Mapping[str, Measured], text: TokenSet) -> str:
    pairs = [(_RANDOM, _UNIFORM)] + ([(_EVOLUTION, _RANDOM)] if _EVOLUTION in measured else [])
    losses = {name: by_tokens(each.losses, [text.windows]) for name, each in measured.items()}
    told = [verdict(a, losses[a], b, losses[b], text.source) for a, b in pairs]
    return "; ".join(told) + "."
