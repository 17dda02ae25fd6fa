"""Several processes prune together: the bytes of one, whatever their number, and one sentence where one fails."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prune_cli.ranks.owners import owners, solving_cost
from prune_cli.ranks.ranks import Ranks, _here
from prune_cli.ranks.start import _without_devices
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.forked import ForkedRun, forked_ranks
from tests.programs import programs
from tests.test_killed import wait_until_done
from tests.tiny import save_tiny

SECONDS = 120


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five samples: neither two nor three processes get as many each."""
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    save_file({"input_ids": token_ids(samples=5)}, path)
    return path


def ended(runs: Sequence[ForkedRun]) -> list[tuple[int | None, str, str]]:
    """Of each: exit code, stdout and what it told of errors."""
    found = []
    for run in runs:
        stdout, stderr = run.communicate(SECONDS)
        told = [line for line in stderr.splitlines() if line.startswith(("Error", "Interrupted", "Traceback"))]
        found.append((run.returncode, stdout, "\n".join(told)))
    return found


def pruned_by(count: int, model: Path, out: Path, *arguments: object) -> dict[str, bytes]:
    """What `count` processes write; the first alone talks."""
    runs = ended(forked_ranks(count, "prune", model, out, *arguments, "--batch-size", "1", "--json"))
    assert [(code, told) for code, _, told in runs] == [(0, "")] * count
    assert [stdout == "" for _, stdout, _ in runs] == [rank > 0 for rank in range(count)]
    return folder_bytes(out)


def losses(out: Path) -> list[float]:
    report = json.loads((out / "prune_report.json").read_text())
    return [report["evaluation"][when]["loss"] for when in ("before", "after")]


@pytest.mark.parametrize(
    ("architecture", "count", "arguments"),
    [
        ("llama-untied", 3, ["-m", "wanda", "--refine", "dsnot", "--allocate", "owl", "--include", "lm_head*"]),
        ("mixtral", 2, ["-m", "ria"]),
        ("mixtral", 3, ["-m", "experts", "-s", "0.5", "--samples", "2"]),
        ("gpt_oss", 3, ["-m", "wanda", "--calibrate-by", "block", "--samples", "2"]),
        ("llama-untied", 2, ["-m", "magnitude", "--include", "*norm*"]),
    ],
    ids=["dsnot", "experts", "whole experts", "fewer batches than ranks", "no inputs"],
)
def test_the_bytes_are_those_of_one_process(
    architecture: str, count: int, arguments: list[str], tmp_path: Path, text: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", architecture)
    given = ["--calibration", text, "--eval", text, *arguments]
    assert command("prune", model, tmp_path / "1", *given, "--batch-size", "1", "-q").code == 0
    assert pruned_by(count, model, tmp_path / "ranks", *given) == folder_bytes(tmp_path / "1")
    assert losses(tmp_path / "ranks") == losses(tmp_path / "1")
    told = json.loads((tmp_path / "ranks" / "prune_report.json").read_text())["processes"]
    assert (told["ranks"], told["nodes"], len(told["seconds_waited"])) == (count, 1, count)
    assert told["bytes_reduced"] > 0


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("qwen3_moe", ["--preset", "best"]),
        ("llama-untied", ["-m", "width", "-s", "0.5", "-o", "uniform=false", "-o", "multiple=4"]),
        ("llama-untied", ["-m", "depth", "-o", "remove=1"]),
        ("gpt_oss", ["-m", "experts", "-s", "0.5", "-o", "after=refit"]),
    ],
    ids=["best of maps and experts", "width", "depth", "refit of experts"],
)
def test_solvers_agree_but_for_rounding(
    architecture: str, arguments: list[str], tmp_path: Path, text: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", architecture, shards=False)
    # With seed 0 two scores are so near that noise of 3e-7 in one process changes as many bits as a second process.
    given = [*arguments, "--calibration", text, "--eval", text, "--seed", "1"]
    assert command("prune", model, tmp_path / "1", *given, "--batch-size", "1", "-q").code == 0
    pruned_by(2, model, tmp_path / "2", *given)
    one, two = (load_file(tmp_path / count / "model.safetensors") for count in "12")
    bits = sum(int(((one[name] == 0) != (two[name] == 0)).sum()) for name in one)
    assert bits <= 1e-4 * sum(tensor.numel() for tensor in one.values())
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-3)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-3)


def test_a_run_of_ranks_that_die_goes_on_with_any_number(tmp_path: Path, text: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", "llama-untied", num_hidden_layers=8)
    given = ["-m", "wanda", "--calibration", text, "--batch-size", "1", "-q"]
    assert command("prune", model, tmp_path / "1", *given).code == 0
    out = tmp_path / "out"
    for blocks, victim in ((1, 1), (3, 0)):
        runs = forked_ranks(2, "prune", model, out, *given, "--resume")
        wait_until_done(out, blocks, lambda runs=runs: all(run.poll() is None for run in runs))
        runs[victim].send_signal(signal.SIGKILL)
        found = ended(runs)
        assert found[victim][0] == -signal.SIGKILL, found
        code, _, told = found[1 - victim]
        assert code == 1
        assert told.startswith(f"Error: Rank {victim} of 2 (process {runs[victim].pid} on ")
        assert told.endswith("--resume continues what is done so far.")
        assert "\n" not in told
    runs = forked_ranks(3, "prune", model, out, *given, "--resume")
    wait_until_done(out, 5, lambda: all(run.poll() is None for run in runs))
    for run in runs:
        run.send_signal(signal.SIGINT)
    found = ended(runs)
    assert [code for code, _, _ in found] == [130] * 3
    assert "".join(told for _, _, told in found) == "Interrupted; repeat the command with --resume to continue."
    assert pruned_by(3, model, out, *given, "--resume") == folder_bytes(tmp_path / "1")


def test_what_fails_on_one_rank_ends_all_with_its_sentence(tmp_path: Path, text: Path, llama: Path) -> None:
    (tmp_path / "out").mkdir()
    found = ended(forked_ranks(2, "prune", llama, tmp_path / "out", "--calibration", text, "-q"))
    assert [code for code, _, _ in found] == [2, 2]
    assert [told.count("exists already") for _, _, told in found] == [1, 0]


def test_eval_is_shared_by_windows(tmp_path: Path, text: Path, llama: Path, whole: Path, command: RunCommand) -> None:
    given = ["eval", llama, "--data", text, "--against", whole, "--batch-size", "1", "--json"]
    found = ended(forked_ranks(3, *given))
    assert [(code, told) for code, _, told in found] == [(0, "")] * 3
    assert [stdout for _, stdout, _ in found] == [command(*given).stdout, "", ""]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["recover", "a", "b", "--teacher", "c"], "prune-cli recover runs in one process"),
        (["eval", "a", "--tasks", "arc_easy"], "--tasks runs in one process"),
        (["prune", "a", "b", "-s", "2"], "--sparsity is 2"),
    ],
)
def test_what_one_process_does_is_refused_once(
    rank: int, arguments: list[str], sentence: str, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    done = command(*arguments)
    assert done.code == 2
    assert sentence in done.stderr if rank == 0 else done.stderr == ""


def test_devices_start_the_processes(
    tmp_path: Path, text: Path, llama: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["prune", llama, tmp_path / "out", "--calibration", text, "-q", "--devices", "cpu,cpu"]
    assert "--devices is '0,0'" in command(*given[:-1], "0,0").stderr
    assert "exclude each other" in command(*given, "--device", "cpu").stderr
    monkeypatch.setattr(sys, "argv", ["prune-cli", *map(str, given)])
    monkeypatch.setattr(sys, "executable", str(programs() / "python"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        assert command(*given).code == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert (report["processes"]["ranks"], report["environment"]["device"]) == (2, "cpu")


def test_devices_are_not_handed_on() -> None:
    words = ["prune", "--devices", "0,1", "a", "--devices=0", "b", "--device", "cpu"]
    assert _without_devices(words) == ["prune", "a", "b", "--device", "cpu"]


def test_shares_are_consecutive_and_the_first_has_some() -> None:
    for count in range(1, 5):
        for items in range(8):
            ranks = [Ranks(rank, count) for rank in range(count)]
            shares = [list(each.share(range(items))) for each in ranks]
            assert [item for share in shares for item in share] == list(range(items))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert shares[0] or not items
            assert [list(each.before(range(items))) for each in ranks] == [
                [item for share in shares[:rank] for item in share] for rank in range(count)
            ]


def test_the_dearest_layers_are_dealt_out_first() -> None:
    gate = solving_cost(8, 4)
    assert gate == 4**3 + 8 * 4**2
    assert owners([gate, gate, solving_cost(4, 8)], 2) == [1, 1, 0]
    assert owners([1, 1, 1], 1) == [0, 0, 0]


def test_the_option_says_how_long_a_rank_may_be_silent(tmp_path: Path, text: Path, llama: Path) -> None:
    runs = forked_ranks(2, "prune", llama, tmp_path / "out", "--calibration", text, "-q", "--rank-timeout", "2")
    wait_until_done(tmp_path / "out", -1, lambda: all(run.poll() is None for run in runs))
    os.kill(runs[1].pid, signal.SIGSTOP)
    try:
        (code, _, told), *_ = ended(runs[:1])
    finally:
        os.kill(runs[1].pid, signal.SIGKILL)
        runs[1].communicate(SECONDS)
    assert code == 1
    assert told.startswith("Error: Rank 1 of 2 ")
    assert "no sign of life for 2 s (--rank-timeout)" in told


def test_tensors_of_another_device_come_to_the_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def restored(storage: torch.UntypedStorage, device: str) -> torch.UntypedStorage:
        asked.append(device)
        return storage

    monkeypatch.setattr(torch.serialization, "default_restore_location", restored)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    storage = torch.ones(2).untyped_storage()
    assert [_here(storage, device) is storage for device in ("cuda:0", "cpu")] == [True, True]
    assert asked == ["cuda:1", "cpu"]
