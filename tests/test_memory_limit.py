"""--limit-memory: what fits is told and taken, what cannot fit is refused, and no bit of the output changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prune_cli.engine import activation_offload, memory, memory_limit
from prune_cli.engine.activation_budget import ActivationBudget
from prune_cli.engine.estimated_memory import Estimate
from prune_cli.errors import RequestError
from prune_cli.request.sizes import parse_size
from tests.conftest import LENGTH, SAMPLES, RunCommand, folder_bytes


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what was given a place in a file."""
    seen: list[torch.Size] = []
    original = activation_offload._in_a_file

    def note(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
        seen.append(tensor.shape)
        return original(tensor, folder)

    monkeypatch.setattr(activation_offload, "_in_a_file", note)
    return seen


def only_without_states(_: object, estimate: Estimate, budget: ActivationBudget) -> bool:
    """In place of what holds: no budget but that of no hidden state at all."""
    return budget.states == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--preset", "best", "--self-calibration", 1],
        ["--calibrate-by", "block", "--eval"],
        ["-m", "depth", "-o", "remove=1"],
        ["-m", "width", "-s", 0.25],
    ],
    ids=lambda options: " ".join(map(str, options[:2])),
)
def test_the_output_is_the_same(
    options: list[object],
    llama: Path,
    tmp_path: Path,
    tokens_file: Path,
    command: RunCommand,
    in_files: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = [tokens_file] if options[-1] == "--eval" else []
    shared = ["--batch-size", 2, "-q", "--json", "--calibration", tokens_file, *options, *text]
    usual = command("prune", llama, tmp_path / "memory", *shared)
    assert usual.code == 0
    assert not in_files
    assert "memory" not in usual.json
    monkeypatch.setattr(memory_limit._Limits, "hold", only_without_states)
    fitted = command("prune", llama, tmp_path / "files", *shared, "--limit-memory", "20GB")
    assert fitted.json["memory"]["hidden_states"] == 0
    assert folder_bytes(tmp_path / "memory") == folder_bytes(tmp_path / "files")
    assert usual.json["evaluation"] == fitted.json["evaluation"]
    hidden, blocks = json.loads((llama / "config.json").read_text())["hidden_size"], 3
    before_blocks = in_files.count(torch.Size((2, LENGTH, hidden)))
    assert before_blocks >= (SAMPLES // 2) * blocks, "at least before each block"


def test_a_dry_run_tells_what_the_run_then_does(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    prune = ("prune", llama, tmp_path / "out", "--calibration", tokens_file, "--json")
    needed = command(*prune, "--dry-run").json
    assert needed["memory"] is None
    limit = ("--limit-memory", f"{needed['peak_host_bytes'] - 1}B")
    dry, done = command(*prune, *limit, "--dry-run").json, command(*prune, *limit).json
    plan = done["memory"]
    assert dry["memory"] == plan
    assert plan["hidden_states"] == 0
    assert plan["host_estimate"] == dry["peak_host_bytes"] < plan["host_limit"] == needed["peak_host_bytes"] - 1


def test_what_cannot_fit_is_refused_before_the_start(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    prune = ("prune", llama, tmp_path / "out", "--calibration", tokens_file, "--limit-memory")
    refused = command(*prune, "300MB")
    assert (refused.code, list(tmp_path.iterdir())) == (2, [])
    told = refused.stderr.splitlines()[-1]
    assert told.startswith("Error: --limit-memory is 300MB, but pruning takes about 41")
    assert "torch and transformers 419.4 MB" in told
    enough = told.rpartition("allow ")[2].removesuffix(".")
    text = command(*prune, enough, "--dry-run").stdout
    assert "limit" in text
    assert command(*prune, "2").stderr.splitlines()[-1].endswith("must be a size with its unit, as 20GB or 900MiB.")
    assert command(*prune, enough, "-q").code == 0
    assert f"(limit {parse_size('', enough) / 1e6:.1f} MB" in (tmp_path / "out" / "prune_report.md").read_text()


def test_evaluations_and_sweeps_are_refused_too(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    limit = ("--data", tokens_file, "--limit-memory", "300MB")
    evaluated = command("eval", llama, "--against", llama, *limit)
    swept = command("sweep", llama, tmp_path / "out", "--calibration", tokens_file, *limit, "--dry-run")
    assert (evaluated.code, swept.code) == (2, 2)
    assert "--limit-memory is 300MB, but evaluation takes about 41" in evaluated.stderr
    assert "--limit-memory is 300MB, but evaluation takes about 41" in swept.stderr


def test_what_is_free_is_a_limit_too_but_refuses_nothing(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = ("prune", llama, tmp_path / "out", "--calibration", tokens_file)
    needed = command(*prune, "--dry-run", "--json").json["peak_host_bytes"]
    monkeypatch.setattr(memory_limit, "free_on_host", lambda _: needed - 1)
    fitted = command(*prune, "--dry-run", "--json").json
    assert fitted["memory"]["hidden_states"] == 0
    assert not fitted["memory"]["asked"]
    assert fitted["warnings"] == []
    monkeypatch.setattr(memory_limit, "free_on_host", lambda _: 1)
    report = command(*prune, "--json")
    assert report.code == 0
    warning = next(each for each in report.json["warnings"] if "memory" in each or "free" in each)
    assert warning.startswith("Pruning takes about 41")
    assert "more than is free: the system may end the run" in warning
    assert warning in " ".join(report.stderr.split())


def test_what_a_container_may_use_is_free_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = memory.free_on_host()
    assert system is not None
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_in_cgroup() is None
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 400000\n")
    assert memory._free_in_cgroup() == 2_400_000
    free = memory.free_on_host(2)
    assert free is not None
    assert free < system


@pytest.mark.parametrize(("text", "nbytes"), [("20GB", 20 * 10**9), ("1.5 gib", 3 << 29), (".5kB", 500), ("7B", 7)])
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size("--limit-memory", text) == nbytes


@pytest.mark.parametrize("text", ["", "20", "GB", "-1GB", "0GB", "1e3GB", "5%", "2x"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="must be a size with its unit"):
        parse_size("--limit-memory", text)
