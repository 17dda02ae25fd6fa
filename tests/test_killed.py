"""Runs of each kind of method, killed at random moments by SIGKILL, resume to the bytes of a run that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from prune_cli.checkpoint.file_names import JOURNAL, partial_folder
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.forked import ForkedRun
from tests.tiny import save_tiny

RUNS: dict[str, list[str]] = {
    "wanda": ["-m", "wanda"],
    "depth": ["-m", "depth", "-o", "remove=1", "-o", "windows=2"],
    "width": ["-m", "width", "-o", "parts=both", "-s", "0.5"],
    "width of own sizes": ["-m", "width", "-s", "0.5", "-o", "uniform=false", "-o", "multiple=4"],
    "experts": ["-m", "experts", "-s", "0.5"],
}
# Entries for blocks in the journal before a kill; -1: as soon as there is a journal.
KILLS = (-1, 2)


def wait_until_done(out: Path, blocks: int, runs: Callable[[], bool]) -> None:
    """Until the journal counts `blocks` blocks, or exists at all for -1, or nothing `runs` any more."""
    journal = partial_folder(out) / JOURNAL
    while runs():
        text = journal.read_text() if journal.exists() else None
        if text is not None and (blocks < 0 or ("fingerprint" in text and text.count('"block":') >= blocks)):
            return
        time.sleep(0.001)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    save_file({"input_ids": token_ids(samples=8)}, path)
    return path


@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_resume_to_the_same_bytes(name: str, tmp_path: Path, text: Path, command: RunCommand) -> None:
    kind = "gpt_oss" if name == "experts" else "llama-untied"
    model = save_tiny(tmp_path / "model", kind, num_hidden_layers=6)
    arguments = [*RUNS[name], "--calibration", str(text), "--batch-size", "1", "-q"]
    assert command("prune", model, tmp_path / "expected", *arguments).code == 0
    seed = os.environ.get("PRUNE_CLI_KILL_SEED") or str(time.time_ns())
    print(f"The moments are those of PRUNE_CLI_KILL_SEED={seed}")
    out, moments, killed = tmp_path / "out", random.Random(seed), 0
    for blocks in KILLS:
        run = ForkedRun("prune", model, out, *arguments, "--resume")
        wait_until_done(out, blocks, lambda run=run: run.poll() is None)
        time.sleep(moments.uniform(0, 0.02))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        killed += run.returncode == -signal.SIGKILL
    assert killed
    again = command("prune", model, out, *arguments, "--resume", *(["--overwrite"] if out.exists() else []))
    assert again.code == 0, again.stderr
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")
