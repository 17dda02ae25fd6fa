"""What options, config and headers tell is refused without torch: in one cold process that cannot import it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.broken import copy_of
from tests.conftest import SAMPLES
from tests.tiny import save_tiny

_PROGRAM = """
import json, sys
from typer.testing import CliRunner

class NoTorch:
    def find_spec(self, name, *rest):
        if name in ("torch", "transformers", "datasets"):
            raise KeyboardInterrupt
sys.meta_path.insert(0, NoTorch())

from prune_cli.cli import app
found = []
for arguments in json.load(sys.stdin):
    result = CliRunner().invoke(app, arguments)
    found.append([result.exit_code, result.stderr])
json.dump(found, sys.stdout)
"""
REFUSED: list[tuple[str, str]] = [
    ("prune MODEL OUT --calibration TOKENS --samples 7", f"holds {SAMPLES} samples, but --samples asks for 7"),
    ("prune MODEL OUT --eval TOKENS --seq-len 12", "holds samples of 24 tokens"),
    ("prune MODEL OUT -o x=1", "The method wanda has no option 'x'"),
    ("prune MODEL OUT -m admm -o steps=0", "The option steps of the method admm is 0"),
    ("prune MODEL OUT --refine swaps -o swaps.x=2", "The step swaps has no option 'x'"),
    ("prune MODEL OUT -m width -o x=2", "The method width has no option 'x'"),
    ("prune MODEL OUT --pattern 2:4 -s 0.5", "--sparsity and --pattern exclude each other"),
    ("prune MODEL OUT --pattern 3:7", "no multiple of 7, so 3:7 does not fit"),
    ("prune MODEL OUT --exclude no*", "--exclude 'no*' matches no tensor"),
    ("prune MODEL OUT --seq-len 9999", "--seq-len is 9999, but the model takes at most 64 positions"),
    ("prune MODEL OUT --eval nowhere.txt", "There is no text 'nowhere.txt'"),
    ("prune MODEL TAKEN", "exists already"),
    ("prune some/model TAKEN", "exists already"),
    ("prune BARE OUT", "has no config.json"),
    ("prune TAKEN OUT", "has neither model.safetensors nor model.safetensors.index.json"),
    ("eval MODEL --data nowhere.txt", "There is no text 'nowhere.txt'"),
    ("eval MODEL --data TOKENS --device tpu", "--device is 'tpu'"),
    ("eval MODEL --tasks ,", "--tasks names no task"),
    ("bench MODEL --repeats 0", "--repeats is 0"),
    ("soup MODEL OUT", "A soup needs at least two models"),
    ("compare MODEL TAKEN", "has neither model.safetensors"),
    ("check TAKEN --max-kl 1", "has neither model.safetensors"),
    ("bench MODEL --against TAKEN", "has neither model.safetensors"),
    ("sweep MODEL OUT --data builtin --pattern 3:7", "so 3:7 does not fit"),
    ("recover MODEL TAKEN --teacher MODEL", "exists already"),
    ("soup MODEL MODEL TAKEN", "exists already"),
    ("convert TAKEN OUT", "has neither model.safetensors"),
]
BEGUN = ["prune MODEL OUT --calibration TOKENS", "eval MODEL --data TOKENS", "prune MODEL OUT -m magnitude --dry-run"]


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, tokens_file: Path
) -> dict[str, tuple[int, str, Path]]:
    """By command line: exit code, stderr, and the folder that everything lies in."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "taken").mkdir()
    (copy_of(whole, folder / "bare") / "config.json").unlink()
    words = {
        "MODEL": whole,
        "OUT": folder / "out",
        "TAKEN": folder / "taken",
        "BARE": folder / "bare",
        "TOKENS": tokens_file,
    }
    lines = [line for line, _ in REFUSED] + BEGUN
    asked = [[str(words.get(word, word)) for word in line.split()] for line in lines]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    return {line: (*answer, folder) for line, answer in zip(lines, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize(("line", "words"), REFUSED)
def test_a_wrong_request_is_refused_without_torch(
    line: str, words: str, answers: dict[str, tuple[int, str, Path]]
) -> None:
    code, stderr, folder = answers[line]
    assert (code, words in stderr, stderr.count("\n")) == (2, True, 1), stderr
    assert stderr.startswith("Error: ")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("line", BEGUN)
def test_a_run_tells_what_it_reads_before_torch_is_imported(
    line: str, answers: dict[str, tuple[int, str, Path]], whole: Path
) -> None:
    code, stderr, _ = answers[line]
    assert (code, stderr.splitlines()) == (130, [f"Reading {whole}", "Interrupted; nothing was written."])


def test_only_layers_that_are_pruned_for_certain_count_for_a_pattern(tmp_path: Path) -> None:
    """GPT-2 stores its weights the other way round, so only the model itself tells whether 3:4 fits."""
    from prune_cli.errors import RequestError
    from prune_cli.preflight.requests import check_prune
    from prune_cli.request.request import PruneRequest

    def check(kind: str, **sizes: Any) -> None:
        model = save_tiny(tmp_path / kind, kind, shards=False, **sizes)
        check_prune(PruneRequest(str(model), tmp_path / "out", method="magnitude", pattern="3:4"))

    with pytest.raises(RequestError, match=r"down_proj.* 42 "):
        check("llama-untied", intermediate_size=42)
    check("gpt2", n_inner=42)
