"""`prune-cli recover`: blocks trained as a naive reference trains them, zeros held, same bytes when resumed."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from methods._alignment import align
from methods._block_matching import Examples, Schedule, match
from prune_cli.checkpoint.file_names import JOURNAL, partial_folder
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.recovery.read import read_recovery
from prune_cli.recovery.report import recovery_schema
from prune_cli.recovery.request import EPOCHS, RATE
from tests.broken import change_config, copy_of, refused
from tests.calibration_texts import drawn_rows
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.reference import adam_with_a_mask
from tests.tiny import load_plain, save_tiny


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What is fitted, and what the result is judged on."""
    folder = tmp_path_factory.mktemp("texts")
    save_file({"input_ids": token_ids(2, samples=16)}, folder / "fit.safetensors")
    save_file({"input_ids": token_ids(3)}, folder / "eval.safetensors")
    return folder / "fit.safetensors", folder / "eval.safetensors"


def options(texts: tuple[Path, Path], teacher: Path) -> list[object]:
    fit, judge = texts
    told = ["--teacher", teacher, "--calibration", fit, "--eval", judge, "--epochs", 2, "--batch-size", 2]
    return [*told, "--rate", 0.008, "--self-calibration", 0, "-q"]


def pruned(model: Path, out: Path, command: RunCommand, *how: object) -> Path:
    assert command("prune", model, out, *(how or ("-m", "magnitude")), "-q").code == 0
    return out


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second block on."""
    original = OutputFolder._write_block

    def write_block(self: OutputFolder, index: int, tensors: dict, record: dict) -> None:  # pyright: ignore[reportMissingTypeArgument]
        if index == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, index, tensors, record)

    monkeypatch.setattr(OutputFolder, "_write_block", write_block)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def states(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """What plain transformers has before each block, of the whole model."""
    with torch.no_grad():
        return list(load_plain(folder)(ids, output_hidden_states=True).hidden_states)


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule(epochs=3, rate=0.01, last=0.1)


def test_training_is_adam_on_what_is_not_zero(schedule: Schedule) -> None:
    """Against Adam written out, in float64, with the learning rates of the schedule."""
    torch.manual_seed(0)
    inputs, wanted = torch.randn(6, 10, 5), torch.randn(6, 10, 4)
    weight = torch.randn(4, 5) * (torch.rand(4, 5) > 0.5)
    gain = torch.rand(4) + 0.5
    parameters = {"weight": torch.nn.Parameter(weight.clone()), "gain": torch.nn.Parameter(gain.clone())}

    def forward(index: int) -> torch.Tensor:
        return (inputs[index] @ parameters["weight"].T) * parameters["gain"]

    forwards = [lambda at=at: forward(at) for at in range(6)]
    matched = match(
        parameters,
        Examples(forwards[:4], list(wanted[:4])),
        Examples(forwards[4:], list(wanted[4:])),
        schedule,
        torch.Generator().manual_seed(7),
    )
    expected, errors = adam_with_a_mask(inputs, wanted, weight, gain, schedule, torch.Generator().manual_seed(7))
    assert matched.epochs == pytest.approx(errors, rel=1e-4)
    assert matched.best == 1 + errors.index(min(errors))
    for name, value in parameters.items():
        torch.testing.assert_close(value.detach().double(), expected[matched.best - 1][name], rtol=1e-4, atol=1e-6)
    assert torch.equal(parameters["weight"] == 0, weight == 0)


def test_what_does_not_get_better_or_breaks_stays_as_it_was() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
    inputs = torch.tensor([[1.0, 2.0]])

    def forward() -> torch.Tensor:
        return inputs @ weight.T

    perfect = Examples([forward], [torch.tensor([[1.0]])])
    away = Examples([forward], [torch.tensor([[9.0]])])
    matched = match({"w": weight}, away, perfect, Schedule(2, 0.1, 1.0), torch.Generator())
    assert (matched.best, matched.after, weight.tolist()) == (0, 0.0, [[1.0, 0.0]])

    broken = Examples([lambda: forward() / (weight[:, :1] == 1)], [torch.tensor([[2.0]])])
    matched = match({"w": weight}, broken, broken, Schedule(2, 0.1, 1.0), torch.Generator())
    assert (matched.epochs, matched.best, weight.tolist()) == ((), 0, [[1.0, 0.0]])


@given(st.integers(1, 4).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(rows, 6), st.integers(0, 999))))
def test_alignment_is_the_cheapest_in_order(case: tuple[int, int, int]) -> None:
    rows, columns, seed = case
    costs = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = align(costs)
    each = itertools.combinations(range(columns), rows)
    assert tuple(found) == min(each, key=lambda way: sum(float(costs[row, at]) for row, at in enumerate(way)))


@pytest.mark.drawn
def test_a_sparse_model_wins_back_and_keeps_every_zero(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    model, out = pruned(llama, tmp_path / "pruned", command), tmp_path / "out"
    done = command("recover", model, out, *options(texts, llama), "--json")
    assert done.code == 0, done.stderr
    report = done.json
    jsonschema.validate(report, recovery_schema())
    assert read_recovery(out / "recover_report.json").to_json() == done.stdout
    before, after, dense = weights(model), weights(out), weights(llama)
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    for tensor in report["tensors"]:
        same = torch.equal(before[tensor["name"]], after[tensor["name"]])
        assert same == (tensor["action"] == "kept"), tensor
    assert {t["name"] for t in report["tensors"] if t["action"] == "kept"} == {
        name for name in dense if ".layers." not in name
    }
    # The first block sees what the dense model's sees; its errors are those of whole models.
    drawn = drawn_rows(texts[0], 16)
    held_out = drawn.ids[-2:]
    target = states(llama, held_out)[1]
    errors = [float((states(f, held_out)[1] - target).square().sum() / target.square().sum()) for f in (model, out)]
    block = report["blocks"][0]
    assert errors == pytest.approx([block["error_before"], block["error_after"]], rel=1e-4)
    assert block["error_after"] == min(block["epochs"]) < block["error_before"]
    for name, folder in (("dense", llama), ("before", model), ("after", out)):
        loss = command("eval", folder, "--data", texts[1], "--json").json["evaluation"]["loss"]
        assert report["losses"][name]["loss"] == pytest.approx(loss, rel=1e-6)
    verified = command("verify", out, "--against", model, "--json")
    assert (verified.code, verified.json["problems"]) == (0, [])
    for file in ("recover_report.html", "recover_report.md", "README.md"):
        assert f"{report['losses']['after']['loss']:.4f}" in (out / file).read_text()

    name = "model.layers.1.mlp.up_proj.weight"
    file = next(file for file in sorted(out.glob("*.safetensors")) if name in load_file(file))
    tensors = load_file(file)
    tensors[name].view(-1)[(tensors[name].view(-1) == 0).nonzero()[0]] = 1.0
    save_file(tensors, file, {"format": "pt"})
    problems = command("verify", out, "--against", model, "--json").json["problems"]
    assert {problem["name"] for problem in problems} == {name, file.name}


@pytest.mark.parametrize(
    ("architecture", "how", "runs"),
    [
        ("qwen3", ("-m", "depth", "-o", "which=1", "-o", "refit=none"), [[0, 1], [2]]),
        ("gpt2", ("-m", "width", "-s", "0.25", "-o", "refit=none"), [[0], [1], [2]]),
        ("mixtral", ("-m", "experts", "-o", "keep=2"), [[0], [1], [2]]),
        ("mixtral", ("-m", "magnitude", "--pattern", "2:4"), [[0], [1], [2]]),
    ],
    ids=["shallower", "narrower", "fewer experts", "sparse experts"],
)
def test_every_kind_of_output_wins_back(
    architecture: str,
    how: tuple[str, ...],
    runs: list[list[int]],
    texts: tuple[Path, Path],
    tmp_path: Path,
    command: RunCommand,
) -> None:
    dense = save_tiny(tmp_path / "dense", architecture, dtype=torch.bfloat16, shards=False)
    needs_text = "magnitude" not in how
    calibration = ("--calibration", texts[0]) if needs_text else ()
    model = pruned(dense, tmp_path / "pruned", command, *how, *calibration)
    done = command("recover", model, tmp_path / "out", *options(texts, dense), "--json")
    assert done.code == 0, done.stderr
    assert [block["teacher_blocks"] for block in done.json["blocks"]] == runs
    gains = [block["error_before"] - block["error_after"] for block in done.json["blocks"]]
    assert min(gains) >= 0 < max(gains)
    assert command("verify", tmp_path / "out", "--against", model).code == 0
    if architecture != "gpt2" and "experts" not in how:
        return
    # Trained in float32 beside hidden states of 16 bits, as on a GPU.
    half = command("recover", model, tmp_path / "half", *options(texts, dense), "--json", "--dtype", "bfloat16")
    assert half.code == 0, half.stderr
    for one, other in zip(half.json["blocks"], done.json["blocks"], strict=True):
        assert one["error_after"] == pytest.approx(other["error_after"], rel=0.05)


def test_a_run_stopped_at_a_block_continues_to_the_same_bytes(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    model, out = pruned(llama, tmp_path / "pruned", command), tmp_path / "out"
    assert command("recover", model, tmp_path / "expected", *options(texts, llama)).code == 0
    with pytest.MonkeyPatch.context() as patch:
        fill_the_disk(patch)
        stopped = command("recover", model, out, *options(texts, llama))
    assert stopped.code == 1
    assert "No space left on device" in stopped.stderr
    assert "--resume" in stopped.stderr
    assert (partial_folder(out) / JOURNAL).read_text().count('"block":') == 1
    changed = command("recover", model, out, *options(texts, llama), "--rate", 0.5, "--resume")
    assert (changed.code, "(rate differ)" in changed.stderr) == (2, True)
    assert command("recover", model, out, *options(texts, llama), "--resume").code == 0
    reports = {f"recover_report.{kind}" for kind in ("json", "md", "html")}
    found, expected = folder_bytes(out), folder_bytes(tmp_path / "expected")
    assert {name: found[name] for name in found.keys() - reports} == {
        name: expected[name] for name in expected.keys() - reports
    }
    told = json.loads((out / "recover_report.json").read_text())["blocks"]
    assert [line["resumed"] for line in told] == [True, False, False]


def test_refusals(llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand) -> None:
    def not_taken(*arguments: object, teacher: Path = llama) -> str:
        done = command("recover", llama, tmp_path / "out", *options(texts, teacher), *arguments)
        assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert not (tmp_path / "out").exists()
        assert not partial_folder(tmp_path / "out").exists()
        return done.stderr

    assert "--how is 'blocks': choose one of block" in not_taken("--how", "blocks")
    assert "--epochs is 0" in not_taken("--epochs", 0)
    assert "--rate is 2" in not_taken("--rate", 2)
    assert "at least 2" in not_taken("--samples", 1)
    assert "have 128 and 144 entries in the vocabulary" in not_taken(
        teacher=save_tiny(tmp_path / "words", "llama-untied", vocab_size=144)
    )
    assert "have 32 and 64 as hidden size" in not_taken(
        teacher=save_tiny(tmp_path / "wide", "llama-untied", hidden_size=64)
    )
    assert "has 2 blocks, fewer than the 3" in not_taken(
        teacher=save_tiny(tmp_path / "short", "llama-untied", num_hidden_layers=2)
    )
    other = copy_of(llama, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"a": ', '"swap": ').replace('"b": ', '"a": ').replace('"swap": ', '"b": ')
    )
    assert "tokenizers" in not_taken(teacher=other)
    one = tmp_path / "one.safetensors"
    save_file({"input_ids": token_ids(samples=1)}, one)
    assert "needs at least 2" in not_taken("--calibration", one)
    change_config(copy_of(llama, tmp_path / "bert"), architectures=["BertModel"])
    assert "no causal language model" in not_taken(teacher=tmp_path / "bert")


def test_text_that_was_fitted_is_told(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    model = pruned(llama, tmp_path / "pruned", command)
    done = command("recover", model, tmp_path / "out", *options(texts, llama), "--eval", texts[0], "--json")
    assert done.code == 0
    assert "16 of the 16 windows" in done.json["warnings"][0]


def test_another_teacher_than_the_pruned_model_is_told(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    small, other = pruned(llama, tmp_path / "small", command), copy_of(llama, tmp_path / "other")
    shard = sorted(other.glob("*.safetensors"))[0]
    save_file({name: tensor * 1.01 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    for teacher, warnings in ((llama, 0), (other, 1)):
        out = tmp_path / f"by-{teacher.name}"
        assert command("recover", small, out, *options(texts, teacher), "--epochs", 1).code == 0
        report = json.loads((out / "recover_report.json").read_text())
        found = [text for text in report["warnings"] if "is not the model that was pruned" in text]
        assert len(found) == warnings
        assert all(shard.name in text for text in found)


def test_states_that_are_not_finite_end_the_run(texts: tuple[Path, Path], tmp_path: Path, command: RunCommand) -> None:
    dense = save_tiny(tmp_path / "dense", "llama-untied", shards=False)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e25
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e25
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    done = command("recover", dense, tmp_path / "out", *options(texts, dense))
    assert (done.code, done.stderr.count("\n")) == (1, 1)
    assert "not finite" in done.stderr


def test_prune_matches_blocks_as_recover_does(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    """The first block alone is pruned alike with and without: what is trained before it would change the others."""
    how, text = ("-m", "admm", "--target", "dense", "-o", "steps=2"), ("--calibration", texts[0], "--batch-size", 2)
    model = pruned(llama, tmp_path / "pruned", command, *how, *text)
    usual = ("--epochs", EPOCHS, "--rate", RATE)
    recovered = command("recover", model, tmp_path / "recovered", *options(texts, llama), *usual, "--json")
    matching = ["prune", llama, tmp_path / "out", *how, *text, "--match-blocks"]
    done = command(*matching, "-q", "--json")
    assert done.code == 0, done.stderr
    report = done.json
    for key in ("error_before", "error_after", "epochs"):
        assert report["matched"][0][key] == pytest.approx(recovered.json["blocks"][0][key], rel=1e-3)
    assert report["totals"]["sparsity_of_pruned"] == 0.5
    trained = {t["name"] for t in report["tensors"] if t["action"] == "refitted"}
    assert trained == {name for name in weights(llama) if "norm" in name and ".layers." in name}
    verified = command("verify", tmp_path / "out", "--against", llama, "--json")
    assert (verified.code, verified.json["problems"]) == (0, [])

    matching[2] = tmp_path / "again"
    with pytest.MonkeyPatch.context() as patch:
        fill_the_disk(patch)
        assert command(*matching, "-q").code == 1
    assert command(*matching, "-q", "--resume").code == 0
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "out")


def test_match_blocks_is_for_weights(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    assert "--match-blocks is for methods that make weights sparse" in refused(
        command, llama, tmp_path / "out", "-m", "depth", "--match-blocks"
    )
    save_file({"input_ids": token_ids(samples=1)}, tmp_path / "one.safetensors")
    told = refused(command, llama, tmp_path / "out", "--calibration", tmp_path / "one.safetensors", "--match-blocks")
    assert "--match-blocks needs at least 2" in told
