"""What was made from inputs with hashes is used with the same ones, or refused, or told: weights, texts, files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import RunCommand, token_ids
from tests.tiny import save_tiny

ALLOW = "--allow-changed-inputs"
WEIGHTS, TOKENS = "model.safetensors (sha256 ", "calibration tokens (sha256 "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense`, `tokens.safetensors`, and `pruned`, made of them; nothing in it is written to."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "dense", "llama-untied", shards=False)
    save_file({"input_ids": token_ids(samples=3)}, folder / "tokens.safetensors")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: RunCommand) -> Path:
    """A copy of all that, to be worked in."""
    if not (made / "pruned").exists():
        monkeypatch.chdir(made)
        text = ["--calibration", "tokens.safetensors", "--eval", "tokens.safetensors"]
        assert command("prune", "dense", "pruned", *text, "--save-recipe", "recipe.yaml", "-q").code == 0
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def other_weights(place: Path) -> None:
    """One number of the dense model becomes another."""
    tensors = load_file(place / "dense" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, place / "dense" / "model.safetensors", metadata={"format": "pt"})


def other_tokens(place: Path) -> None:
    save_file({"input_ids": token_ids(seed=5, samples=3)}, place / "tokens.safetensors")


@pytest.mark.parametrize("recipe", ["pruned/prune_report.json", "recipe.yaml"])
@pytest.mark.parametrize(("change", "named"), [(other_weights, WEIGHTS), (other_tokens, TOKENS)])
def test_a_recipe_knows_its_inputs(
    place: Path, command: RunCommand, recipe: str, change: Callable[[Path], None], named: str
) -> None:
    change(place)
    repeat = ("prune", "out", "--recipe", recipe)
    refused = command(*repeat, "-q")
    assert refused.code == 2
    assert f"What --recipe gives was made with other inputs than these: {named}" in refused.stderr
    assert ALLOW in refused.stderr
    assert not (place / "out.partial").exists()
    shown = command(*repeat, ALLOW)
    assert shown.code == 0
    assert named in shown.stdout
    report = command(*repeat, ALLOW, "--overwrite", "--json").json
    assert [warning for warning in report["warnings"] if named in warning]


def test_what_is_said_otherwise_is_not_held_against_the_recipe(place: Path, command: RunCommand) -> None:
    save_file({"input_ids": token_ids(seed=5, samples=3)}, place / "mine.safetensors")
    arguments = ("prune", "out", "--recipe", "pruned/prune_report.json", "--calibration", "mine.safetensors", "--json")
    report = command(*arguments).json
    assert not [warning for warning in report["warnings"] if "other inputs" in warning]
    other_weights(place)
    assert command(*arguments, "--overwrite").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "pruned", "--max-kl", "99"),
        ("eval", "pruned", "--against", "dense", "--data", "tokens.safetensors"),
        ("verify", "pruned", "--against", "dense"),
        ("prune", "dense", "out", "-m", "magnitude", "--allocate", "file:pruned/prune_report.json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_dense_model_that_changed_is_told(place: Path, command: RunCommand, arguments: tuple[str, ...]) -> None:
    assert command(*arguments, "--json").code == 0
    shutil.rmtree(place / "out", ignore_errors=True)
    other_weights(place)
    refused = command(*arguments, "--json")
    assert refused.code == (1 if arguments[0] == "verify" else 2)
    assert WEIGHTS in refused.stdout
    shutil.rmtree(place / "out", ignore_errors=True)
    allowed = command(*arguments, ALLOW, "--json")
    assert WEIGHTS in allowed.stdout
    # The norm that differs is a kept tensor, which verify tells whatever is allowed.
    assert allowed.code == (1 if arguments[0] == "verify" else 0)
    if arguments[0] == "check":
        assert "Warning" in command(*arguments, ALLOW).stdout


def test_a_soup_is_of_one_dense_model(place: Path, command: RunCommand) -> None:
    other_weights(place)
    assert command("prune", "dense", "other", "--calibration", "tokens.safetensors", "-q").code == 0
    soup = ("soup", "pruned", "other", "mixed", "--masks", "union", "-q")
    refused = command(*soup)
    assert refused.code == 2
    assert f"other, unlike pruned, was made with other inputs than these: {WEIGHTS}" in refused.stderr
    assert command(*soup, ALLOW).code == 0


def test_statistics_of_another_text_are_used_only_where_that_is_allowed(place: Path, command: RunCommand) -> None:
    prune = ("prune", "dense", "-m", "depth", "-o", "score=angular", "--calibration", "tokens.safetensors")
    assert command(*prune, "first", "--save-statistics", "s.safetensors", "-q").code == 0
    other_tokens(place)
    refused = command(*prune, "second", "--statistics", "s.safetensors", "-q")
    assert refused.code == 2
    assert f"--statistics s.safetensors was made with other inputs than these: {TOKENS}" in refused.stderr
    report = command(*prune, "second", "--statistics", "s.safetensors", ALLOW, "--json").json
    assert TOKENS in report["warnings"][-1]


def test_a_check_on_the_reports_text_sees_that_the_text_is_another(place: Path, command: RunCommand) -> None:
    other_tokens(place)
    refused = command("check", "pruned", "--max-perplexity", "1000000000", "-q")
    assert refused.code == 2
    assert "evaluation tokens (sha256 " in refused.stderr
    assert command("check", "pruned", "--max-perplexity", "1000000000", "--data", "tokens.safetensors", "-q").code == 0
