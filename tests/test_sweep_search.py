"""`prune-cli sweep --search`: budgets, what is judged on what, the allocation file end to end, and honesty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from methods._allocation import mean_sparsity
from prune_cli.errors import PruneError
from prune_cli.request.presets import PRESETS
from prune_cli.sweeps import workers
from prune_cli.sweeps.search import CHILDREN, children, random_tables, start_of_evolution
from prune_cli.sweeps.search_report import search_schema, verdict
from tests.conftest import RunCommand, token_ids

COUNTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=10)


@settings(deadline=None, max_examples=30)
@given(COUNTS, st.floats(0.1, 0.9), st.integers(0, 1000))
def test_every_candidate_keeps_the_budget(sizes: list[int], asked: float, seed: int) -> None:
    counts = {str(block): size for block, size in enumerate(sizes)}
    tables = random_tables(counts, asked, 6, seed)
    assert tables[0] == dict.fromkeys(counts, asked)
    assert random_tables(counts, asked, 9, seed)[:6] == tables, "a larger budget begins the same"
    born = children(list(enumerate(tables)), counts, asked, CHILDREN, seed)
    assert born == children(list(enumerate(tables)), counts, asked, CHILDREN, seed)
    for table in (*tables, *born):
        assert table.keys() == counts.keys()
        assert mean_sparsity(table, counts) == pytest.approx(asked, abs=1e-9)
        assert all(0 <= value < 1 for value in table.values())


def test_evolution_finds_what_a_smooth_loss_asks_for() -> None:
    """On a loss with one valley it comes closer than random search with as many candidates."""
    counts = dict.fromkeys(map(str, range(6)), 100)
    valley = {str(block): 0.35 + 0.1 * block for block in range(6)}

    def loss(table: dict[str, float]) -> float:
        return sum((table[block] - valley[block]) ** 2 for block in counts)

    tables = random_tables(counts, 0.6, 80, seed=0)
    judged = [(loss(table), table) for table in tables[: start_of_evolution(80)]]
    while len(judged) < 80:
        judged += [(loss(table), table) for table in children(judged, counts, 0.6, CHILDREN, seed=0)]
    assert min(judged)[0] < 0.5 * min(loss(table) for table in tables)


def test_a_verdict_is_honest() -> None:
    noise = [0.1, -0.2, 0.15, -0.05, 0.02, 0.01]
    low, high = [1 + n for n in noise], [1.5 + n * 1.1 for n in noise]
    assert verdict("evolution", low, "random search", high, "x").startswith("evolution beats random search by 0.5")
    assert "does not beat" in verdict("evolution", high, "random search", low, "x")
    assert verdict("evolution", high, "random search", low, "x").endswith("worse")
    assert verdict("evolution", [1.0, 1.2], "random search", [1.2, 1.1], "x").endswith("within chance")
    assert verdict("evolution", low, "random search", low, "x") == "evolution found nothing else than random search"


@pytest.fixture
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Calibration windows in a file with six more for judging, and a file to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    save_file({"input_ids": token_ids(0, 12)}, folder / "calibration.safetensors")
    save_file({"input_ids": token_ids(1, 8)}, folder / "data.safetensors")
    calibration = ("--calibration", folder / "calibration.safetensors", "--samples", 6, "--batch-size", 4)
    return ("--data", folder / "data.safetensors", *calibration, "-q")


@pytest.mark.parametrize(("strategy", "method"), [("random", "best"), ("evolution", "wanda")])
def test_the_allocation_is_what_prune_takes(
    strategy: str, method: str, llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand
) -> None:
    search = ("--search", strategy, "--budget", 6, "--held-out", 6, "-m", method, "-s", 0.6)
    done = command("sweep", llama, tmp_path / "found", *search, *texts)
    assert done.code == 0, done.stderr
    report = json.loads((tmp_path / "found" / "search.json").read_text())
    jsonschema.validate(report, search_schema())
    assert json.loads((tmp_path / "found" / "allocation.json").read_text()) == report["allocation"]
    names = ["uniform", "random search", *(["evolution"] if strategy == "evolution" else [])]
    assert [result["name"] for result in report["results"]] == names
    assert report["held_out_windows"] == 6
    for name in names[1:]:
        tried = [candidate for candidate in report["candidates"] if name in candidate["of"]]
        assert len(tried) == 6
        best = next(result for result in report["results"] if result["name"] == name)
        assert best["held_out_loss"] == min(candidate["held_out_loss"] for candidate in tried)
    assert names[-1] in report["verdict"]

    out, given = tmp_path / "pruned", f"file:{tmp_path / 'found' / 'allocation.json'}"
    how = ("--preset" if method in PRESETS else "-m", method)
    pruned = command("prune", llama, out, *how, "--allocate", given, "--eval", *texts[1:])
    assert pruned.code == 0, pruned.stderr
    written = json.loads((out / "prune_report.json").read_text())
    winner = next(result for result in report["results"] if result["name"] == report["winner"])
    assert written["evaluation"]["after"] == winner["evaluation"]
    uniform = command("prune", llama, tmp_path / "even", *how, "-s", 0.6, "--allocate", "uniform", "--eval", *texts[1:])
    assert uniform.code == 0
    even = json.loads((tmp_path / "even" / "prune_report.json").read_text())
    assert even["evaluation"]["after"] == report["results"][0]["evaluation"]
    pruned_tensors = [tensor for tensor in written["tensors"] if tensor["action"] == "pruned"]
    short = 0.6 * written["totals"]["pruned_parameters"] - written["totals"]["zeros_in_pruned"]
    assert -1e-6 <= short <= sum(tensor["shape"][0] for tensor in pruned_tensors), "a row gives whole weights"


def test_a_killed_search_continues_to_the_same_result(
    llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = ("--search", "evolution", "--budget", 6, "--held-out", 6, "-s", 0.6, *texts)
    assert command("sweep", llama, tmp_path / "expected", *search).code == 0
    original, left = workers.measure_concurrently, iter(range(1))

    def measure(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise PruneError("the plug was pulled")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "measure_concurrently", measure)
        assert command("sweep", llama, tmp_path / "out", *search).code == 1
    assert command("sweep", llama, tmp_path / "out", *search, "--resume").code == 0
    one, other = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("expected", "out"))
    for key in ("candidates", "results", "winner", "verdict", "allocation"):
        assert one[key] == other[key]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--search", "grid", "-s", 0.5], "random or evolution"),
        (["--search", "random"], "one --sparsity"),
        (["--search", "random", "-s", 0], "one --sparsity"),
        (["--search", "random", "-s", 0.5, "-m", "wanda,ria"], "one --method"),
        (["--search", "random", "-s", 0.5, "--pattern", "2:4"], "no --pattern"),
        (["--search", "random", "-s", 0.5, "--budget", 1], "--budget"),
        (["--search", "random", "-s", 0.5, "--held-out", 0], "--held-out"),
        (["--search", "random", "-s", 0.5, "--dry-run"], "--dry-run"),
        (["--budget", 5], "--search"),
    ],
)
def test_refusals_of_a_search(
    arguments: list[Any], why: str, llama: Path, tmp_path: Path, texts: tuple[Any, ...], command: RunCommand
) -> None:
    refused = command("sweep", llama, tmp_path / "out", *arguments, *texts)
    assert refused.code == 2
    assert why in refused.stderr
    assert not list(tmp_path.iterdir())
