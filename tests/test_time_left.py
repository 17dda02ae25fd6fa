"""The time left of a whole run, and what --dry-run says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prune_cli.progress import Silent
from prune_cli.recovery.request import RecoverRequest
from prune_cli.recovery.run import recover
from prune_cli.report.format import duration_range
from prune_cli.request.request import PruneRequest
from prune_cli.run import prune
from prune_cli.structured.dry_run import dry_run_structured
from prune_cli.sweeps.estimate import estimate
from prune_cli.sweeps.request import SweepRequest
from prune_cli.sweeps.run import sweep
from prune_cli.sweeps.search_request import SearchRequest
from prune_cli.sweeps.search_run import search
from prune_cli.time_left import ExpectedStage, TimeLeft
from prune_cli.unstructured.dry_run import dry_run


class Clock:
    """Seconds that pass only when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_that_nobody_expected_goes_at_its_own_pace() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.stage("Comparing", 10)
    assert left.seconds() is None
    clock.now += 6
    left.advance(4)
    assert (left.seconds(), left.knows_all) == (pytest.approx(9), False)


def test_the_time_left_is_that_of_all_stages_at_the_pace_of_their_kind() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.expect(
        [
            ExpectedStage("Before", "evaluation", 10),
            ExpectedStage("Refitting", "fit", 5),
            ExpectedStage("Pruning", "pruning", 20),
            ExpectedStage("After", "evaluation", 10),
        ]
    )
    left.stage("Reading text", 1)
    clock.now += 3
    left.stage("Before", 4)
    assert left.seconds() is None
    clock.now += 4
    left.advance(1)
    # 4 s for a quarter of it: 12 s of its own, and all others at 4 s for 2.5.
    assert (left.seconds(), left.knows_all) == (pytest.approx(12 + 1.6 * 35), True)
    clock.now += 16
    left.advance(3)
    left.stage("Pruning with wanda", 10)  # the stage between was left out
    assert left.seconds() == pytest.approx(2.0 * 20 + 2.0 * 10)
    clock.now += 100
    left.advance(5)
    # Its own pace is known now, that of evaluation as before.
    assert left.seconds() == pytest.approx(100 + 2.0 * 10)
    clock.now += 100
    left.advance(5)
    left.stage("After", 4)
    clock.now += 5
    assert left.seconds() == pytest.approx(20 - 5)


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [(0.3, 1.9, "under 2 s"), (4.44, 12.4, "4.4 to 12 s"), (60, 150, "1 to 2.5 min"), (6000, 14400, "1.7 to 4 h")],
)
def test_a_range_has_one_unit(low: float, high: float, told: str) -> None:
    assert duration_range(low, high) == told


class Recorded(Silent):
    """What a run told that it would do, and what it then did."""

    def __init__(self) -> None:
        self.expected: list[ExpectedStage] = []
        self.stages: list[str] = []

    def expect(self, stages: Sequence[ExpectedStage]) -> None:
        self.expected = list(stages)

    def stage(self, title: str, steps: int) -> None:
        self.stages.append(title)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "best", "self_calibration": 1, "generate": 1, "format": "sparse"},
        {"method": "magnitude", "allocate": "global"},
        {"method": "wanda", "allocate": "atp", "calibrate_by": "block"},
        {"method": "depth", "options": {"remove": 1, "windows": 2}},
        {"method": "width", "options": {"uniform": False}, "sparsity": 0.25},
    ],
    ids=lambda options: f"{options.get('preset', options.get('method'))}",
)
def test_every_stage_that_takes_its_time_is_expected(
    options: dict[str, object], whole: Path, tokens_file: Path, tmp_path: Path
) -> None:
    text = str(tokens_file)
    request = PruneRequest(model=str(whole), out=tmp_path / "out", calibration=text, eval=text, **options)  # pyright: ignore[reportArgumentType]
    foretold = (dry_run_structured if request.is_structured else dry_run)(request)
    seen = Recorded()
    prune(request, seen)
    check_all_expected(seen)
    assert list(foretold.seconds.stages) == list(dict.fromkeys(each.title for each in seen.expected))
    assert 0 < foretold.seconds.low < sum(foretold.seconds.stages.values()) < foretold.seconds.high


def check_all_expected(seen: Recorded) -> None:
    """What was expected came, in its order, and nothing else but texts to read."""
    titles = [each.title for each in seen.expected]
    unplanned = [stage for stage in seen.stages if not any(stage.startswith(title) for title in titles)]
    assert set(unplanned) <= {"Reading text"}
    places = iter(seen.stages)
    assert [title for title in titles if not any(stage.startswith(title) for stage in places)] == []
    assert min(each.work for each in seen.expected) > 0


def test_sweeps_and_recoveries_are_expected_too(whole: Path, tokens_file: Path, tmp_path: Path) -> None:
    text, seen = str(tokens_file), Recorded()
    request = SweepRequest(str(whole), tmp_path / "sweep", text, None, "best", "0.5", sensitivity=0, calibration=text)
    foretold = estimate(request, Silent()).seconds
    sweep(request, seen)
    check_all_expected(seen)
    assert list(foretold.stages) == [each.title for each in seen.expected]
    seen = Recorded()
    search(SearchRequest(replace(request, out=tmp_path / "search"), "evolution", budget=9, held_out=2), seen)
    check_all_expected(seen)
    assert [each.title for each in seen.expected].count("Evolution") == 2, "four, then five that are born in two steps"
    prune(PruneRequest(model=str(whole), out=tmp_path / "pruned", method="magnitude"))
    recovery = RecoverRequest(
        model=str(tmp_path / "pruned"),
        out=tmp_path / "out",
        teacher=str(whole),
        calibration=text,
        eval=text,
        self_calibration=1,
        epochs=1,
    )
    for how in ("block", "full"):
        seen = Recorded()
        recover(replace(recovery, how=how, out=tmp_path / how), seen)
        check_all_expected(seen)


def test_a_probe_leaves_the_random_numbers_and_the_folder_alone(whole: Path, tokens_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    first = torch.rand(2)
    torch.manual_seed(3)
    dry_run(PruneRequest(model=str(whole), out=tmp_path / "out", calibration=str(tokens_file), method="admm"))
    assert torch.equal(torch.rand(2), first)
    assert list(tmp_path.iterdir()) == []
