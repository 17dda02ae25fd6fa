"""From what was measured to what is told: increases over the dense model, a knee per method, a table per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibration.tokens import TokenSet
from prune_cli.engine.evaluate import by_tokens, mean, standard_error, summary
from prune_cli.packed.output import output_bytes
from prune_cli.sparse.saved_bytes import saved_bytes
from prune_cli.sweeps.knee import find_knee
from prune_cli.sweeps.point_run import Measured
from prune_cli.sweeps.report import BlockSensitivity, KneeReport, PointReport, Sensitivity
from prune_cli.unstructured.plan import n_of_m, pattern_of
from prune_cli.unstructured.prepare import PruningPlan


def increases(losses: Sequence[float], dense: Sequence[float], text: TokenSet) -> list[float]:
    """Of every window of `text`, in nats, each counting by its tokens."""
    return by_tokens([mine - other for mine, other in zip(losses, dense, strict=True)], [text.windows])


def point_reports(
    points: Sequence[Measured], plan: PruningPlan, dense: Sequence[float], text: TokenSet, with_zero: Sequence[str]
) -> list[PointReport]:
    """In their order, of the model of `plan`; the methods `with_zero` begin at sparsity 0, which is the dense model."""
    found = [replace(_point_report(point, dense, text), size=_size(point, plan)) for point in points]
    for method in with_zero:
        at = next((at for at, point in enumerate(found) if point.method == method), len(found))
        found.insert(at, PointReport(method, None, 0.0, 0.0, summary(dense, text.windows), 0.0, 0.0, 0.0))
    return found


def _point_report(measured: Measured, dense: Sequence[float], text: TokenSet) -> PointReport:
    grown = increases(measured.losses, dense, text)
    request = measured.point.request
    return PointReport(
        method=measured.point.method,
        pattern=request.pattern,
        asked_sparsity=pattern_of(request).sparsity,
        sparsity=measured.sparsity,
        evaluation=summary(measured.losses, text.windows),
        loss_increase=mean(grown),
        loss_increase_standard_error=standard_error(grown),
        seconds=measured.seconds,
    )


def _size(measured: Measured, plan: PruningPlan) -> float:
    """As a sparse file, where every tensor has its share of the zeros."""
    checkpoint, pattern = plan.checkpoint, n_of_m(pattern_of(measured.point.request))
    entries = [checkpoint.entries[name] for name in plan.pruned_names()]
    saved = sum(saved_bytes(entry, round(measured.sparsity * entry.count), pattern) for entry in entries)
    return 1 - saved / output_bytes(checkpoint)


def knees(
    points: Sequence[Measured], dense: Sequence[float], text: TokenSet, with_zero: Sequence[str]
) -> list[KneeReport]:
    """One for each method with unstructured points; those `with_zero` begin at sparsity 0 without an increase."""
    curves: dict[str, dict[float, list[float]]] = {}
    for measured in points:
        sparsity = measured.point.request.sparsity
        if measured.point.request.pattern is None and sparsity is not None:
            start = {0.0: [0.0] * len(dense)} if measured.point.method in with_zero else {}
            curve = curves.setdefault(measured.point.method, start)
            curve[sparsity] = increases(measured.losses, dense, text)
    return [KneeReport(method, find_knee(list(curve), list(curve.values()))) for method, curve in curves.items()]


def sensitivity(points: Sequence[Measured], dense: Sequence[float], text: TokenSet) -> Sensitivity | None:
    """What each block costs when it alone is pruned; None where none was."""
    blocks = []
    for measured in points:
        grown = increases(measured.losses, dense, text)
        assert measured.point.block is not None
        blocks.append(BlockSensitivity(measured.point.block, measured.sparsity, mean(grown), standard_error(grown)))
    if not points:
        return None
    return Sensitivity(points[0].point.method, points[0].point.request.sparsity or 0.0, blocks)
