"""The whole engine on a device that is not the host: nothing is mixed up, and no batch is waited for by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.forked import run_program
from tests.tiny import save_tiny

# Batches of one sample in the run with float64, and in the one without.
FEW, MORE = 2, 3
# Numbers for the whole vocabulary are drawn on the host, window by window: there is no room for those of all.
MAY_WAIT = ("prune_cli/engine/self_calibration.py",)
PRUNE: dict[str, tuple[str, list[str]]] = {
    "wanda": ("llama-untied", ["-m", "wanda", "--calibrate-by", "block", "--allocate", "owl", "--refine", "dsnot"]),
    "best": ("llama-untied", ["--preset", "best", "-o", "steps=4", "-o", "polish=2", "--self-calibration", "0"]),
    "matched blocks": ("llama-untied", ["-m", "wanda", "--allocate", "sensitivity", "--match-blocks"]),
    "masks of experts": ("mixtral", ["-m", "ria", "--self-calibration", "1"]),
    "experts": ("mixtral", ["-m", "experts", "-s", "0.5"]),
    "width": ("llama-untied", ["-m", "width", "-s", "0.5", "-o", "uniform=false", "-o", "multiple=4"]),
    "depth": ("two-blocks", ["-m", "depth", "-o", "remove=1", "-o", "score=influence"]),
}
# Whose result is compared with the host's, and whether it adds in one order on every device.
SAME_BYTES = {"wanda": True, "best": False, "experts": True, "width": False}
PROGRAM = """
import json, sys
from tests.pretend_device import watched
print(json.dumps(watched(json.loads(sys.argv[1]))))
"""


@dataclass(frozen=True)
class Files:
    """What the runs read and write."""

    folder: Path

    def text(self, samples: int) -> Path:
        return self.folder / f"{samples}.safetensors"

    def out(self, name: str, samples: int) -> Path:
        return self.folder / f"{name}-{samples}"

    def prune(self, name: str, out: Path, samples: int) -> list[str]:
        model, options = PRUNE[name]
        text = self.text(samples)
        words = ["prune", self.folder / model, out, *options, "--calibration", text, "--eval", text, "-q"]
        return [str(each) for each in (*words, "--batch-size", 1)]

    def evaluate(self, samples: int) -> list[str]:
        words = ["eval", self.folder / "mixtral", "--data", self.text(samples), "--against", self.folder / "mixtral"]
        return [str(each) for each in (*words, "--batch-size", 1, "--json")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    found = Files(tmp_path_factory.mktemp("device"))
    for model, kind in (("llama-untied", "llama-untied"), ("two-blocks", "llama-untied"), ("mixtral", "mixtral")):
        save_tiny(found.folder / model, kind, shards=False, num_hidden_layers=1 + (model == "two-blocks"))
    for samples in (FEW, MORE):
        save_file({"input_ids": token_ids(samples=samples, length=16)}, found.text(samples))
    return found


@pytest.fixture(scope="module")
def runs(files: Files) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Each by name on the device, twice; in one process, for a device is there until a process ends."""
    twice = [(FEW, True), (MORE, False)]
    commands = [(wide, files.prune(name, files.out(name, n), n)) for name in PRUNE for n, wide in twice]
    commands += [(wide, files.evaluate(n)) for n, wide in twice]
    done = run_program(PROGRAM, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    return {name: results[2 * at : 2 * at + 2] for at, name in enumerate([*PRUNE, "eval"])}


@pytest.mark.parametrize("name", [*PRUNE, "eval"])
def test_nothing_is_mixed_up_and_no_batch_is_waited_for(
    name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    few, more = runs[name]
    assert (few["code"], more["code"]) == (0, 0), few["told"] + more["told"]
    grown = {line: count for line, count in more["waits"].items() if count > few["waits"].get(line, 0)}
    # Without float64 the host does what needs it, once a block.
    assert not [line for line in grown if not line.startswith(MAY_WAIT) and not line.endswith(" _float64")], grown


@pytest.mark.parametrize("name", SAME_BYTES)
def test_the_result_is_that_of_the_host(
    name: str, runs: Mapping[str, object], files: Files, tmp_path: Path, command: RunCommand
) -> None:
    assert runs
    assert command(*files.prune(name, tmp_path / "out", FEW)).code == 0
    outs = tmp_path / "out", files.out(name, FEW)
    on_host, on_device = (json.loads((out / "prune_report.json").read_text()) for out in outs)
    assert on_device["environment"]["device"] == "pretend:0"
    losses = [each["evaluation"]["after"]["loss"] for each in (on_device, on_host)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    if SAME_BYTES[name]:
        assert folder_bytes(outs[0]) == folder_bytes(outs[1])
