"""The story of a sweep, top to bottom."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from calibration.tokens import TokenSet
from prune_cli.checkpoint.inputs import hash_files
from prune_cli.engine.evaluate import PROTOCOL, losses_of_windows, passes_of, summary
from prune_cli.engine.memory_limit import within_memory
from prune_cli.engine.provenance import batch_size_of, environment, model_facts, text_report, versions
from prune_cli.engine.self_calibration import self_calibrated
from prune_cli.engine.texts import TextReader, read_evaluation
from prune_cli.errors import RequestError
from prune_cli.model.architecture import load_tokenizer
from prune_cli.packed.output import describe, exact_values
from prune_cli.preflight.models_and_texts import open_text
from prune_cli.progress import Progress, Silent
from prune_cli.report.drawing import NOT_DRAWN
from prune_cli.request.request import DEFAULT_SOURCE, check_device
from prune_cli.sweeps.curves import knees, point_reports, sensitivity
from prune_cli.sweeps.journal import Journal, check_folder
from prune_cli.sweeps.knee import DEFINITION
from prune_cli.sweeps.memory import estimated_memory_of_sweep
from prune_cli.sweeps.plot import pictures
from prune_cli.sweeps.point_run import Measured, SweepTexts, plan_of
from prune_cli.sweeps.report import BLOCKS_CSV, SCHEMA_VERSION, SWEEP_CSV, SWEEP_JSON, SweepReport
from prune_cli.sweeps.request import Point, SweepRequest
from prune_cli.sweeps.stages import EVALUATING, MEASURING, stages_of_sweep
from prune_cli.sweeps.workers import Load, load_of, measure_points
from prune_cli.time_left import ExpectedStage
from prune_cli.unstructured.allocate_by_outputs import OutputScores, measure_scores
from prune_cli.unstructured.plan import pattern_of
from prune_cli.unstructured.prepare import PruningPlan, prepare
from prune_cli.unstructured.stages import PruningPace, usual_pruning_pace
from prune_cli.version import __version__


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep: the same plan on each device, the texts, and all points."""

    plans: Sequence[PruningPlan]
    texts: SweepTexts
    grid: Sequence[Point]
    alone: Sequence[Point]

    @property
    def points(self) -> list[Point]:
        return [*self.grid, *self.alone]

    @property
    def plan(self) -> PruningPlan:
        return self.plans[0]

    def load(self, points: Sequence[Point]) -> Load:
        """What `points` weigh, and how many of them go side by side."""
        calibration = self.texts.calibration.ids.numel() if self.texts.calibration else 0
        copies = max((point.copies for point in points), default=0)
        tokens = calibration * (1 + copies) + self.texts.evaluation.ids.numel()
        return load_of(self.plan, points, tokens, len(self.plans))


@torch.no_grad()
def sweep(request: SweepRequest, progress: Progress | None = None) -> SweepReport:
    """Measure every point of `request` and write OUTDIR; returns the report that is written there too.

    Raises RequestError before any work where the request cannot be met, PruneError where the run fails. A sweep that
    was killed continues with `resume=True` to the same results.
    """
    progress = progress or Silent()
    begun = time.monotonic()
    sweep_plan = plan_sweep(request, progress)
    progress.expect(expected_stages(sweep_plan, usual_pruning_pace))
    sweep_plan = with_allocated(with_sampled(sweep_plan, progress), progress)
    for warning in warnings_of(request, sweep_plan):
        progress.say(f"warning: {warning}")
    files = hash_files(sweep_plan.plan.checkpoint.folder, sweep_plan.plan.checkpoint.files)
    shared = fingerprint(request, sweep_plan, files)
    with Journal(request.out, shared, resume=request.resume) as journal:
        dense = evaluate_dense(sweep_plan, journal, progress)
        measured = measure(sweep_plan, sweep_plan.points, journal, progress, MEASURING)
        report = _report(request, sweep_plan, files, dense, measured, time.monotonic() - begun)
        drawn = pictures(report)
        if not drawn:
            progress.say(f"warning: {NOT_DRAWN}")
        contents = {SWEEP_JSON: report.to_json(), SWEEP_CSV: report.to_csv(), **drawn}
        if report.sensitivity is not None:
            contents[BLOCKS_CSV] = report.blocks_csv()
        journal.commit(contents)
    return report


def plan_sweep(request: SweepRequest, progress: Progress) -> SweepPlan:
    """Check all that can be checked without weights, every point, and read the texts."""
    request.check()
    check_folder(request.out, resume=request.resume, overwrite=request.overwrite)
    for device in request.devices:
        check_device(device)
    first = request.first()
    plans = [prepare(replace(first, device=device), writes=False) for device in _devices(request)]
    plan = plans[0]
    grid = request.points()
    alone = request.sensitivity_points(_blocks_to_prune(plan))
    for point in (*grid, *alone[:1]):
        _check_inside_blocks(plan_of(point, plan, plan.model))
    texts = read_texts(request, plan, [*grid, *alone], progress)
    grid, alone = ([_settled(point, plan, texts) for point in points] for points in (grid, alone))
    if grid or alone:
        estimate = estimated_memory_of_sweep(plan, [*grid, *alone[:1]], texts)
        plans = [within_memory(each, estimate) for each in plans]
    return SweepPlan(plans, texts, grid, alone)


def expected_stages(sweep_plan: SweepPlan, pace_of: Callable[[PruningPlan], PruningPace]) -> list[ExpectedStage]:
    """What the whole sweep goes through, at the pace of each of its methods."""
    points, workers = sweep_plan.points, len(sweep_plan.plans)
    return stages_of_sweep(points, sweep_plan.plan, sweep_plan.texts, pace_of, workers) if points else []


def _settled(point: Point, plan: PruningPlan, texts: SweepTexts) -> Point:
    """With what `prune` would make of --self-calibration for this text."""
    if texts.calibration is None:
        return point
    return replace(point, copies=plan_of(point, plan, plan.model).copies_of(texts.calibration))


def _devices(request: SweepRequest) -> list[str]:
    """`auto` is every CUDA device there is."""
    if request.devices == ("auto",) and torch.cuda.device_count() > 1:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return list(request.devices)


def _blocks_to_prune(plan: PruningPlan) -> list[int]:
    return [block for block in range(len(plan.model.blocks)) if plan.pruned_names(block)]


def _check_inside_blocks(plan: PruningPlan) -> None:
    outside = plan.pruned_names(len(plan.model.blocks))
    if outside:
        raise RequestError(
            f"{outside[0]} lies outside the blocks, and a sweep measures what is inside: leave it out of --include."
        )


def read_texts(request: SweepRequest, plan: PruningPlan, points: Sequence[Point], progress: Progress) -> SweepTexts:
    """The evaluation windows, and the calibration windows where a point needs them; as `prune` would read them."""
    progress.stage("Reading text", 1)
    tokenizer = load_tokenizer(plan.source.folder, plan.trust_remote_code, plan.model.config)
    reader = TextReader(plan.model, tokenizer, request.seq_len, request.seed)
    calibration = None
    if any(point.request.pipeline().needs for point in points):
        source = open_text(DEFAULT_SOURCE if request.calibration is None else request.calibration)
        calibration = reader.read(source, "calibration", request.samples)
    evaluation = read_evaluation(reader, open_text(request.data), request.windows)
    return SweepTexts(calibration, evaluation)


def with_sampled(sweep_plan: SweepPlan, progress: Progress) -> SweepPlan:
    """The windows that the dense model samples for points with --self-calibration, as `prune` would sample them."""
    calibration, plan = sweep_plan.texts.calibration, sweep_plan.plan
    numbers = {point.copies for point in sweep_plan.points} - {0}
    if calibration is None or not numbers:
        return sweep_plan
    request = sweep_plan.points[0].request
    batching = plan.batching(calibration.windows)
    sampled = {
        copies: self_calibrated(calibration, copies, plan.model, batching, request.seed, progress)
        for copies in sorted(numbers)
    }
    return replace(sweep_plan, texts=replace(sweep_plan.texts, sampled=sampled))


def with_allocated(sweep_plan: SweepPlan, progress: Progress) -> SweepPlan:
    """The tables of points that spread their sparsity by sensitivities, which are measured once for all of them."""
    plan, texts = sweep_plan.plan, sweep_plan.texts
    scores: dict[int, OutputScores] = {}

    def allocated(point: Point) -> Point:
        if point.request.allocation != "sensitivity":
            return point
        if point.copies not in scores:
            scores[point.copies] = measure_scores(plan, plan.batches(texts.of(point).windows), progress)
        asked = pattern_of(point.request).sparsity
        counts = {name: info.entry.count for name, info in plan.pruned_infos(point.block).items()}
        table = scores[point.copies].sparsities(asked, counts)
        return replace(point, allocation=dict.fromkeys(plan.pruned_names(), asked) | table)

    grid, alone = ([allocated(point) for point in points] for points in (sweep_plan.grid, sweep_plan.alone))
    found = {copies: each.outputs for copies, each in scores.items()}
    return replace(sweep_plan, grid=grid, alone=alone, texts=replace(texts, sensitivities=found))


def fingerprint(request: SweepRequest, sweep_plan: SweepPlan, files: dict[str, str]) -> dict[str, Any]:
    """What all points share; what is a point's own is in its line of the journal."""
    texts, plan = sweep_plan.texts, sweep_plan.plan
    sizes = [batch_size_of(plan, tokens) for tokens in (texts.calibration, texts.evaluation)]
    names = "\n".join(plan.pruned_names())
    return {
        "model": files,
        "data": texts.evaluation.sha256,
        "calibration": texts.calibration and texts.calibration.sha256,
        "batch_size": sizes,
        "seed": request.seed,
        "packed": describe(plan.checkpoint),
        "calibrate_by": request.calibrate_by,
        "pruned tensors": hashlib.sha256(names.encode()).hexdigest(),
        "device": plan.device.type,
        "dtype": str(plan.dtype),
        "versions": versions(),
    }


def evaluate_dense(sweep_plan: SweepPlan, journal: Journal, progress: Progress) -> list[float]:
    """The dense model's loss on every window; measured once, also when the sweep is resumed.

    Raises PruneError where it is not finite.
    """
    if "dense" not in journal.notes:
        plan, windows = sweep_plan.plan, sweep_plan.texts.evaluation.windows
        batching = plan.batching(windows)
        progress.stage(EVALUATING, len(plan.model.blocks) * passes_of(plan.model, windows, batching))
        checkpoint = exact_values(plan.checkpoint)
        model = plan.model if checkpoint is plan.checkpoint else plan.with_checkpoint(checkpoint)
        journal.notes["dense"] = losses_of_windows(model, windows, batching, progress)
        summary(journal.notes["dense"], windows)
        journal.note("dense", journal.notes["dense"])
    return journal.notes["dense"]


def measure(
    sweep_plan: SweepPlan, points: Sequence[Point], journal: Journal, progress: Progress, title: str
) -> dict[str, Measured]:
    """`points` by key: what the journal has, and what is measured now, on the texts of `sweep_plan`.

    Raises PruneError where a loss is not finite.
    """
    found = {point.key: journal.find(point) for point in points}
    left = [point for point in points if found[point.key] is None]
    left = list({point.key: point for point in left}.values())
    together = sweep_plan.load(left).together
    told = f"{title}: {len(left)} points, {together} side by side"
    progress.stage(told, len(left) * len(sweep_plan.plan.model.blocks))
    for group in measure_points(left, sweep_plan.plans, sweep_plan.texts, together, journal.folder, progress):
        for measured in group:
            summary(measured.losses, sweep_plan.texts.evaluation.windows)
            journal.add(measured)
            found[measured.point.key] = measured
    return {key: measured for key, measured in found.items() if measured is not None}


def _report(
    request: SweepRequest,
    sweep_plan: SweepPlan,
    files: dict[str, str],
    dense: Sequence[float],
    measured: dict[str, Measured],
    seconds: float,
) -> SweepReport:
    plan, texts = sweep_plan.plan, sweep_plan.texts
    grid = [replace(measured[point.key], point=point) for point in sweep_plan.grid]
    alone = [replace(measured[point.key], point=point) for point in sweep_plan.alone]
    with_zero = request.methods if 0 in request.sparsities else ()
    return SweepReport(
        schema_version=SCHEMA_VERSION,
        tool={"name": "prune-cli", "version": __version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        request=as_json(request),
        environment=asdict(environment(plan, batch_size_of(plan, texts.evaluation))),
        model=asdict(model_facts(plan, files)),
        protocol=PROTOCOL,
        text=text_report(texts.evaluation),
        calibration=text_report(texts.calibration) if texts.calibration else None,
        dense=summary(dense, texts.evaluation.windows),
        points=point_reports(grid, plan, dense, texts.evaluation, with_zero),
        knee_definition=DEFINITION,
        knees=knees(grid, dense, texts.evaluation, with_zero),
        sensitivity=sensitivity(alone, dense, texts.evaluation),
        seconds=seconds,
        warnings=warnings_of(request, sweep_plan),
    )


def as_json(request: SweepRequest) -> dict[str, Any]:
    """As it stands in a report."""
    lists = {"include": list(request.include), "exclude": list(request.exclude)}
    return {**asdict(request), "out": str(request.out), **lists}


def warnings_of(request: SweepRequest, sweep_plan: SweepPlan) -> list[str]:
    """What a user should know of the request, the texts and the memory."""
    texts = sweep_plan.texts
    found: list[TokenSet] = [text for text in (texts.calibration, texts.evaluation) if text]
    of_texts = [warning for text in found for warning in text.warnings]
    return [*request.notes, *of_texts, *sweep_plan.plan.warnings]
