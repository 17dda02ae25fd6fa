"""Lists of the experts that stay: written for runtimes, and read back to the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import RunCommand, folder_bytes
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The middle block has no experts."""
    return save_tiny(tmp_path_factory.mktemp("keep") / "model", "qwen3_moe", shards=False, tokenizer=False)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_list_says_what_stays_and_gives_the_same_model(
    form: str, model: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    path, told = tmp_path / f"keep.{form}", ["-m", "experts", "-q"]
    given = [*told, "-o", "keep=3", "-o", f"save_keep_list={path}", "--calibration", tokens_file, "--json"]
    result = command("prune", model, tmp_path / "first", *given)
    assert result.code == 0, result.stderr
    scores = {each["block"]: list(each["scores"].values()) for each in result.json["structure"]["blocks"]}
    best = {block: sorted(range(4), key=lambda e, v=values: -v[e]) for block, values in scores.items() if values}
    if form == "jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines == [{str(block): order[:3]} for block, order in best.items()]
    else:
        assert json.loads(path.read_text()) == {
            "k": 3,
            "layers": [0, 2],
            "keep": {str(block): sorted(order[:3]) for block, order in best.items()},
            "ranking": {str(block): order for block, order in best.items()},
        }

    again = command("prune", model, tmp_path / "second", *told, "-o", f"keep_list={path}")
    assert again.code == 0, again.stderr
    assert folder_bytes(tmp_path / "second") == folder_bytes(tmp_path / "first")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"0": [0, 1]}\n{"2": [0, 1, 2]}\n', "keeps from 2 to 3 experts a layer"),
        ('{"0": [0, 1]}\n{"1": [0, 1]}\n', "has the layers [0, 1], but those with experts are [0, 2]"),
        ('{"0": [0, 4]}\n{"2": [0, 1]}\n', "expected numbers from 0 to 3"),
        ('{"0": [0, 0]}\n{"2": [0, 1]}\n', "none of them twice"),
        ('{"0": [0]}\n{"2": [0]}\n', "at least 2 must stay"),
        ('{"0": [0, 1, 2, 3]}\n{"2": [0, 1, 2, 3]}\n', "removes none of the 4 experts"),
        ('{"0": [0, true]}\n{"2": [0, 1]}\n', "is no keep list (True is no number of an expert)"),
        ('{"0": [0, 1]}\n{"0": [0, 1]}\n', "has a layer twice"),
        ("[1]\n", "is no keep list"),
    ],
)
def test_a_list_that_does_not_fit_is_told(
    text: str, words: str, model: Path, tmp_path: Path, command: RunCommand
) -> None:
    path = tmp_path / "keep.jsonl"
    path.write_text(text)
    result = command("prune", model, tmp_path / "out", "-m", "experts", "-o", f"keep_list={path}", "--dry-run")
    assert result.code == 2
    assert words in " ".join(result.stderr.split())
