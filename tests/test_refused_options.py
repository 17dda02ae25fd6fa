"""Options that make no sense, alone or with the model at hand: each refused in one sentence that names the option."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.broken import refused
from tests.conftest import RunCommand
from tests.tiny import save_tiny

OPTIONS: list[tuple[list[str], str]] = [
    (["-s", "1"], "--sparsity is 1, but must be at least 0 and below 1"),
    (["-s", "-0.1"], "--sparsity is -0.1"),
    (["-s", "nan"], "--sparsity is nan"),
    (["-s", "inf"], "--sparsity is inf"),
    (["--pattern", "4:2"], "--pattern is '4:2', but must be N:M with 0 < N < M"),
    (["--pattern", "2:2"], "--pattern is '2:2'"),
    (["--pattern", "0:4"], "--pattern is '0:4'"),
    (["--pattern", "-1:4"], "--pattern is '-1:4'"),
    (["--pattern", "2-4"], "--pattern is '2-4'"),
    (["--pattern", "\N{SUPERSCRIPT TWO}:4"], "--pattern is"),
    (["--pattern", "1:" + "9" * 5000], "--pattern is"),
    (["--pattern", "2:4", "-s", "0.5"], "--sparsity and --pattern exclude each other"),
    (["-m", "nonsense"], "There is no method 'nonsense': choose one of "),
    (["-m", "_method"], "There is no method '_method'"),
    (["-m", "../magnitude"], "There is no method '../magnitude'"),
    (["-o", "x"], "-o 'x' is no KEY=VALUE"),
    (["-o", "x=1"], "The method magnitude has no option 'x': it has per"),
    (["-o", "per=galaxy"], "The option per of the method magnitude is 'galaxy', but must be one of"),
    (["-m", "admm", "-o", "steps=0"], "The option steps of the method admm is 0, but must be at least 1"),
    (["-m", "admm", "-o", "alpha=1.5"], "must be at least 0 and at most 1"),
    (["-m", "ria", "-o", "power=inf"], "The option power of the method ria is inf, but must be at least 0"),
    (["--refine", "swaps", "-o", "swaps.rounds=-3"], "must be at least 1"),
    (["-m", "random", "-o", "x=1"], "The method random has no option 'x': it has none"),
    (["--preset", "bestest"], "--preset is 'bestest': choose one of fast, balanced, best"),
    (["--refine", "polish"], "--refine is 'polish': choose one of dsnot, swaps"),
    (["-m", "admm", "--refine", "swaps"], "--refine swaps gives kept weights their dense values back"),
    (["-o", "swaps.rounds=2"], "The option 'swaps.rounds' names the step 'swaps': this run has none"),
    (["--refine", "swaps", "-o", "swaps.x=2"], "The step swaps has no option 'x': it has alpha, candidates, rounds"),
    (["--target", "dense"], "--target dense is for what works towards outputs, and magnitude looks at scores alone"),
    (["--device", "tpu"], "--device is 'tpu': choose auto"),
    (["--device", "cpu:0"], "--device is 'cpu:0'"),
    (["--device", "cuda:9999"], "--device is cuda:9999, but torch sees"),
    (["--device", "cuda:" + "9" * 5000], "--device is"),
    (["--dtype", "int8"], "--dtype is 'int8': choose one of auto, float32"),
    (["--batch-size", "0"], "--batch-size is 0, but must be at least 1"),
    (["--batch-size", "-1"], "--batch-size is '-1', but must be a whole number or auto"),
    (["--batch-size", "1.5"], "--batch-size is '1.5'"),
    (["--batch-size", "9999999999"], "--batch-size is 9999999999, but must be at most"),
    (["--batch-size", "9" * 5000], "--batch-size is"),
    (["--seed", "-1"], "--seed is -1, but must be between 0"),
    (["--seed", str(2**63)], "--seed is 9223372036854775808"),
    (["--samples", "0"], "--samples is 0, but must be at least 1"),
    (["--seq-len", "1"], "--seq-len is 1, but must be at least 2"),
    (["--seq-len", "65", "--calibration", "builtin"], "--seq-len is 65, but the model takes at most 64 positions"),
    (["--calibrate-by", "map"], "--calibrate-by is 'map': choose sublayer or block"),
    (["--calibration", ""], "an empty name"),
    (["--calibration", "nowhere.txt"], "There is no text 'nowhere.txt'"),
    (["--eval", "nowhere.txt"], "There is no text 'nowhere.txt'"),
    (["--include", "nothing*"], "--include 'nothing*' matches no tensor"),
    (["--exclude", "nothing*"], "--exclude 'nothing*' matches no tensor"),
    (["--exclude", "*"], "Nothing is left to prune"),
]


@pytest.mark.parametrize(("arguments", "words"), OPTIONS, ids=lambda value: " ".join(value)[:40])
def test_options_that_make_no_sense(
    arguments: list[str], words: str, whole: Path, tmp_path: Path, command: RunCommand
) -> None:
    if "-m" not in arguments:
        arguments = ["-m", "magnitude", *arguments]
    assert words in refused(command, whole, tmp_path / "out", *arguments)


@pytest.mark.parametrize("option", ["--sparsity", "--seed", "--samples", "--seq-len"])
def test_a_word_in_place_of_a_number(option: str, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    outcome = command("prune", whole, tmp_path / "out", "-m", "magnitude", option, "many")
    assert outcome.code == 2
    kind = "number" if option == "--sparsity" else "integer"
    assert outcome.stderr.splitlines()[-1] == f"Error: {option} is 'many', but must be a valid {kind}."
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recover", "a", "b"], "--teacher is missing: "),
        (["recover", "a"], "OUT is missing: Folder to write"),
        (["sweep", "a", "b"], "--data is missing: Text on which"),
        (["soup", "a"], "MODELS is missing: "),
    ],
    ids=" ".join,
)
def test_what_is_missing_is_told_with_what_it_is_for(words: list[str], told: str, command: RunCommand) -> None:
    outcome = command(*words)
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1].startswith(f"Error: {told}")


@pytest.mark.parametrize("pattern", ["3:8", "2:4", "15:16"])
@pytest.mark.parametrize("kind", ["llama-untied", "gpt2"])
def test_patterns_that_fit_no_shape_name_the_tensor(
    kind: str, pattern: str, tmp_path: Path, command: RunCommand
) -> None:
    name = {"gpt2": "transformer.h.0.mlp.c_proj.weight", "llama-untied": "model.layers.0.mlp.down_proj.weight"}[kind]
    model = save_tiny(tmp_path / "model", kind, shards=False, n_inner=42, intermediate_size=42)
    message = refused(command, model, tmp_path / "out", "--pattern", pattern)
    assert f"{name} has 42 inputs, no multiple of {pattern.split(':')[1]}, so {pattern} does not fit" in message
    excluded = ["--exclude", name.replace(".0.", ".*.")]
    assert command("prune", model, tmp_path / "out", "-m", "magnitude", "--pattern", pattern, *excluded).code == 0
