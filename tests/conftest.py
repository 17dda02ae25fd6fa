"""Shared by all tests: tiny checkpoints, token files, and the command line as a user calls it."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from safetensors.torch import save_file
from typer.testing import CliRunner

from prune_cli.cli import app
from tests.drawing import draw_charts
from tests.tiny import VOCABULARY, save_tiny

SAMPLES, LENGTH = 6, 24

# pytest-xdist runs a worker per core: more threads in each would only wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As on a user's machine: without bytecode every process that a test starts would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# Building the tree of commands takes a tenth of a second; every test calls some.
typer.testing._get_command = cache(typer.testing._get_command)  # pyright: ignore[reportPrivateImportUsage]


def pytest_runtest_setup(item: pytest.Item) -> None:
    draw_charts(really=item.get_closest_marker("drawn") is not None)


@dataclass(frozen=True)
class Outcome:
    """What a command printed and how it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


RunCommand = Callable[..., Outcome]


@pytest.fixture
def command() -> RunCommand:
    """Run `prune-cli` in this process; the arguments are turned into text."""

    def run(*arguments: object) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


def token_ids(seed: int = 0, samples: int = SAMPLES, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 28, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tokens_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pre-tokenised text: `token_ids()` as a .safetensors file."""
    path = tmp_path_factory.mktemp("tokens") / "calibration.safetensors"
    save_file({"input_ids": token_ids()}, path)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied Llama in several shards; never written to."""
    return save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama-untied")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in one file; never written to."""
    return save_tiny(tmp_path_factory.mktemp("whole") / "model", "llama-untied", shards=False)


def folder_bytes(folder: Path, *, without_reports: bool = True) -> dict[str, bytes]:
    """Every file of a folder, but for the reports and the card, which tell of times and of the command."""
    told = ("README.md", "prune_report.json", "prune_report.md", "prune_report.html") if without_reports else ()
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in told
    }


def pytest_collection_finish() -> None:
    """Else each collection of garbage looks at all that was imported."""
    gc.freeze()
