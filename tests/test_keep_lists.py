"""Lists of the experts that stay: written for runtimes, and read back to the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from methods.structured.experts import spread
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


def naive_counts(scores: dict[int, list[float]], keep: int, fewest: int) -> dict[int, int]:
    """One expert after the other: the best that is left, by its score over the mean of its layer."""
    left = {
        (layer, rank): score / (sum(values) / len(values))
        for layer, values in scores.items()
        for rank, score in enumerate(sorted(values, reverse=True))
        if rank >= fewest
    }
    counts = dict.fromkeys(scores, fewest)
    for _ in range(keep * len(scores) - fewest * len(scores)):
        best = max(left, key=left.__getitem__)
        del left[best]
        counts[best[0]] += 1
    return counts


def test_a_list_alone_may_be_uneven(model: Path, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    """At the exact total, without any weights; such a list is converted, and makes no checkpoint."""
    text = ["-m", "experts", "-o", "keep=3", "--calibration", tokens_file]
    whole = command("prune", model, tmp_path / "whole", *text, "--json").json
    scores = {b["block"]: list(b["scores"].values()) for b in whole["structure"]["blocks"] if b["scores"]}
    wanted = naive_counts(scores, 3, 2)
    done = command("prune", model, tmp_path / "keep.json", *text, "--allocate", "global", "--keep-list-only", "--json")
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "keep.json").read_text())
    assert {int(layer): len(kept) for layer, kept in found["keep"].items()} == wanted
    assert sum(wanted.values()) == 6
    for layer, values in scores.items():
        best = sorted(range(4), key=lambda expert, v=values: -v[expert])
        assert found["ranking"][str(layer)] == best
        assert found["keep"][str(layer)] == sorted(best[: wanted[layer]])

    uneven = tmp_path / "uneven.jsonl"
    uneven.write_text('{"0": [3, 1]}\n{"2": [2, 0, 1]}\n')
    listed = ["-m", "experts", "-o", f"keep_list={uneven}"]
    again = command("prune", model, tmp_path / "again.json", *listed, "--keep-list-only")
    assert again.code == 0, again.stderr
    told = json.loads((tmp_path / "again.json").read_text())
    assert (told["k"], told["keep"]) == ([2, 3], {"0": [1, 3], "2": [0, 1, 2]})
    assert "5 of 8 experts" in again.stdout
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"whole"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "experts", "--allocate", "global"], "add --keep-list-only"),
        (["-m", "experts", "--allocate", "owl", "--keep-list-only"], "--allocate is for methods that make weights"),
        (["--keep-list-only"], "--keep-list-only is for --method experts, not wanda"),
        (["-m", "experts", "--keep-list-only"], "does not end in .jsonl"),
        (["-m", "experts", "--keep-list-only", "--eval", "builtin"], "--eval is for a run that writes a model"),
    ],
)
def test_lists_alone_are_refused_where_they_cannot_be(
    arguments: list[str], words: str, model: Path, tmp_path: Path, command: RunCommand
) -> None:
    result = command("prune", model, tmp_path / "out", *arguments)
    assert result.code == 2
    assert words in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_groups_stay_of_one_size_where_layers_differ() -> None:
    values = {0: torch.tensor([9.0, 8, 7, 1, 1, 1, 1, 1]), 1: torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1])}
    assert spread(values, 12, {0: 4, 1: 4}, 2) == {0: 6, 1: 6}
    assert spread(values, 10, {0: 4, 1: 4}, 2) == {0: 6, 1: 4}
    assert spread({5: torch.zeros(4), 7: torch.zeros(4)}, 5, {5: 1, 7: 1}, 1) == {5: 4, 7: 1}
