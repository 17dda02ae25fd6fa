"""Resuming, step by step and without a clock: the run is stopped after each block, and in the middle of one."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from prune_cli.checkpoint.file_names import JOURNAL, REPORT_JSON, partial_folder
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.cli import app
from prune_cli.errors import PruneError
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.forked import ForkedRun
from tests.tiny import save_tiny


class PulledPlugError(PruneError):
    """Stands for a crash: the run ends here."""


def _stop_when(monkeypatch: pytest.MonkeyPatch, block: int, *, half_written: bool) -> None:
    original = OutputFolder._write_block

    def write_block(self: OutputFolder, index: int, tensors: dict, record: dict) -> None:  # pyright: ignore[reportMissingTypeArgument]
        if index == block:
            if half_written:
                name, tensor = next(iter(tensors.items()))
                self._overwrite(self._source.entries[name], tensor * 0 + 7)
            raise PulledPlugError("the plug was pulled")
        original(self, index, tensors, record)

    monkeypatch.setattr(OutputFolder, "_write_block", write_block)


@pytest.fixture(scope="module")
def expected(llama: Path, tokens_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """By the steps of calibration, the bytes of a run that nothing stops."""
    root = tmp_path_factory.mktemp("expected")
    for by in ("sublayer", "block"):
        words = ["prune", llama, root / by, "--calibration", tokens_file, "--calibrate-by", by, "-q"]
        assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    return {by: folder_bytes(root / by) for by in ("sublayer", "block")}


@pytest.mark.parametrize(
    ("block", "half_written", "by"),
    [
        *((block, half_written, "sublayer") for block in (0, 1, 2) for half_written in (False, True)),
        (1, False, "block"),
        (2, True, "block"),
    ],
)
def test_a_run_stopped_at_any_block_continues_to_the_same_bytes(
    block: int,
    half_written: bool,
    by: str,
    llama: Path,
    expected: dict[str, dict[str, bytes]],
    tmp_path: Path,
    tokens_file: Path,
    command: RunCommand,
) -> None:
    arguments = ["--calibration", tokens_file, "--calibrate-by", by, "-q"]
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        _stop_when(patch, block, half_written=half_written)
        stopped = command("prune", llama, out, *arguments)
    assert stopped.code == 1
    assert "the plug was pulled" in stopped.stderr
    assert not out.exists()
    done = (partial_folder(out) / JOURNAL).read_text().count('"block":')
    assert done == block

    assert command("prune", llama, out, *arguments, "--resume").code == 0
    assert folder_bytes(out) == expected[by]
    report = json.loads((out / "prune_report.json").read_text())
    assert [line["resumed"] for line in report["blocks"]] == [index < block for index in range(3)]
    assert all(0 < t["output_error"] < 1 for t in report["tensors"] if t["action"] == "pruned")


def _interrupt(model: Path, out: Path, tokens_file: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _stop_when(patch, 1, half_written=False)
        words = ["prune", model, out, "--calibration", tokens_file, "-q"]
        assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 1


@pytest.fixture(scope="module")
def stopped(llama: Path, tokens_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of a run that was stopped at its second block."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    _interrupt(llama, out, tokens_file)
    return partial_folder(out)


@pytest.fixture
def out(stopped: Path, tmp_path: Path) -> Path:
    """The output of that run."""
    shutil.copytree(stopped, partial_folder(tmp_path / "out"))
    return tmp_path / "out"


def test_a_journal_line_cut_short_is_not_believed(
    llama: Path, out: Path, expected: dict[str, dict[str, bytes]], tokens_file: Path, command: RunCommand
) -> None:
    journal = partial_folder(out) / JOURNAL
    journal.write_text(journal.read_text() + '{"block": 1, "secon')
    assert command("prune", llama, out, "--calibration", tokens_file, "-q", "--resume").code == 0
    assert folder_bytes(out) == expected["sublayer"]


def test_without_resume_an_interrupted_run_is_not_thrown_away(
    llama: Path, out: Path, tokens_file: Path, command: RunCommand
) -> None:
    refused = command("prune", llama, out, "--calibration", tokens_file, "-q")
    assert refused.code == 2
    assert "--resume" in refused.stderr
    assert command("prune", llama, out, "--calibration", tokens_file, "-q", "--overwrite").code == 0


def test_resume_refuses_another_request(llama: Path, out: Path, tokens_file: Path, command: RunCommand) -> None:
    refused = command("prune", llama, out, "--calibration", tokens_file, "-q", "--resume", "-s", 0.7, "--seed", 3)
    assert refused.code == 2
    assert "pattern, seed differ" in refused.stderr


def test_resume_refuses_another_model(tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", "llama-untied")
    out = tmp_path / "out"
    _interrupt(model, out, tokens_file)
    save_tiny(model, "llama-untied", seed=1)
    refused = command("prune", model, out, "--calibration", tokens_file, "-q", "--resume")
    assert refused.code == 2
    assert "has changed since" in refused.stderr


def test_resume_with_nothing_to_resume_simply_starts(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    assert command("prune", llama, tmp_path / "out", "--calibration", tokens_file, "-q", "--resume").code == 0


def test_two_runs_do_not_write_to_one_output(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    partial_folder(out).mkdir()
    with (partial_folder(out) / JOURNAL).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = command("prune", llama, out, "-m", "magnitude", "-q", "--resume")
    assert refused.code == 2
    assert "Another run is writing" in refused.stderr


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_continue(signal_number: signal.Signals, tmp_path: Path, command: RunCommand) -> None:
    # Enough work that the signal comes long before its end.
    model, out = save_tiny(tmp_path / "model", "llama-untied", num_hidden_layers=8), tmp_path / "out"
    text = tmp_path / "text.safetensors"
    save_file({"input_ids": token_ids(samples=8)}, text)
    texts = ("--calibration", text, "--batch-size", 1)
    process = ForkedRun("prune", model, out, *texts)
    journal = partial_folder(out) / JOURNAL
    deadline = time.monotonic() + 60
    while not (journal.exists() and "fingerprint" in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal_number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with: prune-cli prune" in stderr
    assert "Traceback" not in stderr
    assert stderr.rstrip().endswith("--resume")
    resumed = command("prune", model, out, *texts, "--resume", "-q")
    assert resumed.code == 0, resumed.stderr


def test_nothing_is_left_half_valid(stopped: Path) -> None:
    assert (stopped / JOURNAL).exists()
    assert not (stopped / "config.json").exists()
    assert not (stopped / REPORT_JSON).exists()
