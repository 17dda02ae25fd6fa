"""`prune-cli bench`: the facts it tells, its arithmetic, and what it refuses. No test asserts a speed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prune_cli.bench import run
from prune_cli.bench.child import Child, Spec, serve
from prune_cli.bench.result import Round, bench_schema, compare, figure_of, p95, rates_of, spread_warnings
from prune_cli.errors import PruneError
from tests import forked
from tests.broken import change_config, copy_of
from tests.conftest import Outcome, RunCommand
from tests.tiny import load_plain, save_tiny


class ThreadChild(Child):
    """A child in a thread of this process: the same orders without the seconds that a fresh process takes."""

    def __init__(self, spec: Spec) -> None:
        self._pipe, theirs = Pipe()
        self._given = spec.given
        threading.Thread(target=serve, args=(theirs, spec), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._pipe.close()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Child", ThreadChild)


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with two blocks instead of three."""
    return save_tiny(tmp_path_factory.mktemp("shorter") / "model", "llama-untied", num_hidden_layers=2)


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_two_models_side_by_side_in_processes_of_their_own(
    llama: Path, shorter: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prepared as spawned ones are, without the seconds of their imports (tests/forked.py).
    monkeypatch.setattr("prune_cli.bench.child.multiprocessing.get_context", lambda _: forked.SERVER)
    outcome = command("bench", shorter, "--against", llama, "--new-tokens", 4, "--repeats", 3, "--json", "-q")
    assert outcome.code == 0, outcome.stderr
    result = outcome.json
    jsonschema.validate(result, bench_schema())
    assert result["settings"]["prompt_tokens"] == 60  # what 64 positions leave beside 4 new tokens
    for figures, folder in zip(result["models"], (shorter, llama), strict=True):
        assert figures["model"] == str(folder)
        assert figures["architecture"] == "LlamaForCausalLM"
        assert figures["parameters"] == sum(p.numel() for p in load_plain(folder).parameters())
        assert figures["bytes_on_disk"] == _disk(folder)
        assert len(figures["rounds"]) == 3
        assert all(len(each["token_seconds"]) == 3 for each in figures["rounds"])
        # A process with torch and transformers in it, and a model of 100 kB.
        assert 50e6 < figures["library_bytes"] < 5e9
        assert 0 < figures["peak_loading_bytes"] < 200e6
    ratios = {ratio["figure"]: ratio for ratio in result["ratios"]}
    mine, other = result["models"]
    assert ratios["parameters"]["ratio"] == mine["parameters"] / other["parameters"] < 1
    assert ratios["parameters"]["verdict"] == "lower"
    assert ratios["bytes_on_disk"]["ratio"] == _disk(shorter) / _disk(llama)
    by_round = [
        theirs["first_token_seconds"] / ours["first_token_seconds"]
        for ours, theirs in zip(mine["rounds"], other["rounds"], strict=True)
    ]
    # Of the two medians in the columns beside it.
    assert ratios["prefill"]["ratio"] == mine["prefill"]["median"] / other["prefill"]["median"]
    assert min(by_round) <= ratios["prefill"]["ratio"] <= max(by_round)
    assert ratios["prefill"]["highest"] == pytest.approx(max(by_round))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["mamba", "gpt2", "gemma2"])
def test_one_model_of_any_kind_in_a_table(kind: str, tmp_path: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", kind)
    outcome = command("bench", model, "--new-tokens", 3, "--repeats", 2, "--batch-size", 2, "--prompt-tokens", 5)
    assert outcome.code == 0, outcome.stderr
    assert "5 prompt tokens, 3 new ones, batch of 2, 2 rounds, cpu" in outcome.stdout
    assert f"{sum(p.numel() for p in load_plain(model).parameters()):,}" in outcome.stdout
    assert "ratio" not in outcome.stdout.partition("Greedy")[0]


@pytest.mark.usefixtures("threads")
def test_the_generation_config_of_the_checkpoint_changes_nothing(tmp_path: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", "llama-untied")
    every_token = list(range(128))
    (model / "generation_config.json").write_text(f'{{"eos_token_id": {every_token}, "do_sample": true}}')
    result = command("bench", model, "--new-tokens", 6, "--repeats", 1, "--json", "-q").json
    assert len(result["models"][0]["rounds"][0]["token_seconds"]) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--new-tokens", 1], "--new-tokens is 1, but must be between 2 and"),
        (["--prompt-tokens", 0], "--prompt-tokens is 0"),
        (["--repeats", 0], "--repeats is 0"),
        (["--batch-size", -1], "--batch-size is -1"),
        (["--seed", -1], "--seed is -1"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--against-revision", "main"], "--against-revision is of the model that --against names"),
        (["--against", "/nowhere"], "/nowhere is not there"),
    ],
)
def test_what_cannot_be_asked(arguments: list[Any], words: str, llama: Path, command: RunCommand) -> None:
    refused = command("bench", llama, *arguments)
    assert refused.code == 2
    assert words in refused.stderr
    assert refused.stderr.count("\n") == 1


def _lost_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BREAKS: dict[str, tuple[Callable[[Path], Any], list[Any], str]] = {
    "too long": (
        lambda _: None,
        ["--prompt-tokens", 60, "--new-tokens", 5],
        "takes at most 64 positions, but 60 tokens",
    ),
    "no room": (lambda _: None, ["--new-tokens", 64], "but 1 tokens of prompt and 64 new ones"),
    "unknown type": (lambda f: change_config(f, model_type="newest"), [], "cannot be loaded by transformers"),
    "a tensor is lost": (_lost_tensor, [], "lacks 1 tensors that its config describes (model.layers.1.mlp.up_proj"),
    "other shapes": (lambda f: change_config(f, intermediate_size=48), [], "cannot be loaded by transformers"),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", BREAKS)
def test_what_cannot_be_measured(kind: str, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    change, arguments, words = BREAKS[kind]
    model = copy_of(whole, tmp_path / "model")
    change(model)
    # As the other one, too: the sentence names the model that is wrong.
    outcome: Outcome = command("bench", whole, "--against", model, "--repeats", 1, *arguments)
    assert outcome.code == 2, outcome.stdout
    assert words in outcome.stderr.splitlines()[-1]


def test_a_process_that_ends_by_itself_is_told(whole: Path) -> None:
    class Gone(ThreadChild):
        def __init__(self) -> None:
            self._pipe, theirs = Pipe()
            theirs.close()
            self._given = str(whole)
            self._process: Any = threading.Thread()
            self._process.exitcode = -9
            self._process.start()

    with pytest.raises(PruneError, match=r"ended by itself \(exit code -9\)"):
        Gone().load()


# --- arithmetic -----------------------------------------------------------------------------------------------------

_times = st.floats(1e-6, 1e3)
_rounds = st.lists(
    st.builds(Round, _times, st.lists(_times, min_size=1, max_size=9).map(tuple)), min_size=1, max_size=6
)


@given(st.lists(_times, min_size=1, max_size=60))
def test_p95_is_the_smallest_that_19_in_20_do_not_exceed(values: list[float]) -> None:
    found = p95(values)
    assert sum(value <= found for value in values) * 20 >= 19 * len(values)
    assert all(sum(value <= lower for value in values) * 20 < 19 * len(values) for lower in values if lower < found)


@given(_rounds, st.integers(1, 99), st.integers(1, 9))
def test_rates_count_the_whole_batch(rounds: list[Round], prompt: int, batch: int) -> None:
    rates = rates_of(prompt, batch)
    for each in rounds:
        assert rates["prefill"](each) * each.first_token_seconds == pytest.approx(prompt * batch)
        assert rates["decode"](each) * sum(each.token_seconds) == pytest.approx(batch * len(each.token_seconds))
    figure = figure_of(rates["prefill"], rounds)
    assert figure.lowest <= figure.median <= figure.highest


def _figures(seconds: list[float]) -> Any:
    rounds = tuple(Round(each, (each, each)) for each in seconds)
    rates = {name: figure_of(rate, rounds) for name, rate in rates_of(10, 1).items()}
    return run.ModelFigures("m", None, "A", "float32", 10, 40, 1.0, 0, 80, 90, **rates, rounds=rounds)


def test_ratios_pair_the_rounds_so_that_a_drift_of_the_machine_does_not_count() -> None:
    slow, fast = _figures([1.0, 2.0, 4.0]), _figures([0.5, 1.0, 2.0])
    ratios = compare(fast, slow, rates_of(10, 1))
    decode = next(ratio for ratio in ratios if ratio.figure == "decode")
    assert (decode.ratio, decode.lowest, decode.highest, decode.verdict) == (2, 2, 2, "higher")
    assert spread_warnings([fast, slow], ratios) == ()
    alone = spread_warnings([fast], ())
    assert [warning.partition(" differs")[0] for warning in alone] == ["The prefill rate", "The decode rate"]


def test_a_wide_spread_is_told_and_nothing_concluded() -> None:
    ours, other = _figures([1.0, 1.0, 1.0]), _figures([0.9, 1.0, 1.4])
    ratios = compare(ours, other, rates_of(10, 1))
    assert {ratio.figure: ratio.verdict for ratio in ratios}["prefill"] == "undecided"
    (prefill, _) = spread_warnings([ours, other], ratios)
    assert "The prefill ratio differs between rounds by 50% of its median (no conclusion)" in prefill
    slower = _figures([1.5, 2.0, 2.5])
    ratios = compare(ours, slower, rates_of(10, 1))
    assert "(every round says which is faster, but not by how much)" in spread_warnings([ours, slower], ratios)[0]
