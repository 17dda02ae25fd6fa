"""`prune-cli recover --how full`: what plain transformers and torch train, zeros held, same bytes when resumed."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from calibration.sources import parse_source
from calibration.tokens import load_tokens
from methods._block_matching import rms_of_kept, width_of
from methods._distillation import divergence, log_masses, most_probable, square_head
from prune_cli.checkpoint.file_names import partial_folder
from prune_cli.engine.seeds import seed_of
from prune_cli.recovery import end_to_end
from prune_cli.recovery.end_to_end import Course, EndToEnd
from prune_cli.recovery.read import read_recovery
from prune_cli.recovery.report import recovery_schema
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.reference import divergence_of_buckets
from tests.test_recover import pruned, weights
from tests.tiny import VOCABULARY, load_plain, save_tiny

REPORTS = {"recover_report.json", "recover_report.md", "recover_report.html"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What is fitted, and what the result is judged on."""
    folder = tmp_path_factory.mktemp("texts")
    save_file({"input_ids": token_ids(2, samples=10)}, folder / "fit.safetensors")
    save_file({"input_ids": token_ids(3, samples=2)}, folder / "eval.safetensors")
    return folder / "fit.safetensors", folder / "eval.safetensors"


def options(texts: tuple[Path, Path], teacher: Path) -> list[object]:
    """Nine windows are fitted in five steps a pass, one is held out."""
    fit, judge = texts
    told = ["--teacher", teacher, "--how", "full", "--calibration", fit, "--eval", judge, "--batch-size", 2]
    return [*told, "--self-calibration", 0, "--every", 2, "-q"]


def without_reports(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in folder_bytes(folder).items() if name not in REPORTS}


@given(st.integers(2, 7), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_the_divergence_is_that_of_the_known_tokens_and_the_rest(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (4 * torch.randn(3, 8, generator=generator) for _ in range(2))
    found = divergence(student, *most_probable(teacher, k))
    expected = [divergence_of_buckets(ours, theirs, k) for ours, theirs in zip(teacher, student, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_predictions_that_are_certain_have_gradients() -> None:
    """Nothing is left for the other tokens, and a masked entry of the vocabulary has no probability at all."""
    student = torch.tensor([[200.0, 0.0, 0.0, -torch.inf]], requires_grad=True)
    ids, log_p = most_probable(torch.tensor([[0.0, 200.0, 0.0, -torch.inf]]), 2)
    divergence(student, ids, log_p).sum().backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
    assert float(student.grad[0, 0]) > 0 > float(student.grad[0, 1])
    assert float(log_masses(student.detach(), ids).exp().sum()) == pytest.approx(1)


def test_square_head_is_relative_to_each_layer() -> None:
    targets = [torch.tensor([[1.0, 3.0]]), torch.tensor([[0.1, 0.2]])]
    ours = [torch.tensor([[2.0, 3.0]]), torch.tensor([[0.0, 0.0]])]
    assert float(square_head(ours, targets)) == pytest.approx(1 / 10 + 1)


def trained_by_torch(student: Path, teacher: Path, texts: tuple[Path, Path], course: Course) -> Any:
    """Plain models side by side in memory, the whole vocabulary, torch's AdamW: the trained model and its KL."""
    drawn = load_tokens(
        parse_source(str(texts[0])),
        None,
        role="calibration",
        samples=None,
        seq_len=None,
        default_samples=10,
        default_seq_len=24,
        seed=0,
    )
    model, dense = load_plain(student), load_plain(teacher)
    moved = {name: value for name, value in model.named_parameters() if ".layers." in name}
    masks = {name: value.detach() != 0 for name, value in moved.items()}
    shares = [course.rate * math.sqrt(256 / width_of(value)) * rms_of_kept(value) for value in moved.values()]
    groups = [{"params": [value], "lr": share} for value, share in zip(moved.values(), shares, strict=True)]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    batches, looks = drawn.ids[:9].split(2), []

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = dense(ids).logits.log_softmax(-1)
        found = model(ids).logits
        kl = (wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1).mean()
        beside = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return course.kl * kl + course.next_token * beside

    for step in range(course.steps):
        order = torch.Generator().manual_seed(seed_of(f"pass {step // 5}", course.seed))
        ids = batches[int(torch.randperm(5, generator=order)[step % 5])]
        for group, share in zip(optimiser.param_groups, shares, strict=True):
            group["lr"] = share * course.rate_at(step)
        found = loss(ids)
        looks.append(float(found.detach()))
        found.backward()
        for name, value in moved.items():
            assert value.grad is not None
            value.grad *= masks[name]
        torch.nn.utils.clip_grad_norm_(list(moved.values()), 1.0)
        optimiser.step()
        model.zero_grad()
    return model, looks


def test_training_is_what_torch_makes_of_both_models(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    model, out = pruned(llama, tmp_path / "pruned", command), tmp_path / "out"
    how = ("--epochs", 2, "--rate", 0.01, "--next-token", 0.25, "--top-k", VOCABULARY, "--json")
    done = command("recover", model, out, *options(texts, llama), *how)
    assert done.code == 0, done.stderr
    report = done.json
    jsonschema.validate(report, recovery_schema())
    assert read_recovery(out / "recover_report.json").to_json() == done.stdout
    looks = report["training"]["looks"]
    assert [look["step"] for look in looks] == [0, 2, 4, 6, 8, 10]
    held_out = [look["held_out"] for look in looks]
    assert report["training"]["best_step"] == looks[held_out.index(min(held_out))]["step"] == 10
    course = Course(10, 2, 0.01, 1.0, 0.0, 0.25, 0, recompute=False)
    expected, losses = trained_by_torch(model, llama, texts, course)
    # The teacher's logarithms are stored in 16 bits.
    assert [look["loss"] for look in looks[1:]] == pytest.approx(
        [(losses[step - 2] + losses[step - 1]) / 2 for step in range(2, 11, 2)], rel=1e-3
    )
    after, before = weights(out), weights(model)
    for name, value in expected.state_dict().items():
        moved, wanted = after[name] - before[name], value - before[name]
        # Adam's first steps have the sign of a gradient alone, whatever its size.
        assert float((moved - wanted).norm()) <= 0.05 * float(wanted.norm()), name
        assert torch.equal(before[name] == 0, after[name] == 0)
    verified = command("verify", out, "--against", model, "--json")
    assert (verified.code, verified.json["problems"]) == (0, [])
    for file in ("recover_report.html", "recover_report.md", "README.md"):
        assert f"{held_out[-1]:.5f}" in (out / file).read_text()


def test_a_run_stopped_at_any_state_continues_to_the_same_bytes(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    """Also with the hidden states, activations computed again, and the store of the run before."""
    model, out, store = pruned(llama, tmp_path / "pruned", command), tmp_path / "out", tmp_path / "store"
    how = [*options(texts, llama), "--tokens", 500, "--square-head", 0.5, "--store", store]
    assert command("recover", model, tmp_path / "expected", *how).code == 0
    made = {file.name: file.stat().st_mtime_ns for file in store.iterdir()}
    for stop in (4, 8):
        with pytest.MonkeyPatch.context() as patch:
            fill_the_disk(patch, stop)
            resume = ["--resume"] if stop > 4 else []
            stopped = command("recover", model, out, *how, "--gradient-checkpointing", *resume)
        assert (stopped.code, stopped.stderr.count("\n")) == (1, 1), stopped.stderr
        assert "No space left on device" in stopped.stderr
        assert f"at step {stop} " in stopped.stderr
    changed = command("recover", model, out, *how, "--next-token", 1, "--resume")
    assert (changed.code, "(next_token differ)" in changed.stderr) == (2, True)
    assert command("recover", model, out, *how, "--gradient-checkpointing", "--resume").code == 0
    assert without_reports(out) == without_reports(tmp_path / "expected")
    told, expected = (json.loads((each / "recover_report.json").read_text()) for each in (out, tmp_path / "expected"))
    assert told["training"]["looks"] == expected["training"]["looks"]
    assert told["training"]["looks"][-1]["step"] == 12  # 500 tokens are 12 steps of 43.2
    assert {file.name: file.stat().st_mtime_ns for file in store.iterdir()} == made
    assert without_reports(tmp_path / "expected") != without_reports(model)


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """When the state after so many steps is saved."""
    original = end_to_end.save_file

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if json.loads(next(iter(metadata.values())))["done"]["looks"][-1]["step"] == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path, metadata)

    monkeypatch.setattr(end_to_end, "save_file", save)


def test_nan_ends_the_training_and_the_best_is_kept(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    model, out = pruned(llama, tmp_path / "pruned", command), tmp_path / "out"
    original = EndToEnd._loss
    with pytest.MonkeyPatch.context() as patch:
        seen: list[int] = []

        def loss(self: EndToEnd, first: int, batch: Any) -> torch.Tensor:
            seen.append(first)
            return original(self, first, batch) * (math.nan if len(seen) == 3 else 1)

        patch.setattr(EndToEnd, "_loss", loss)
        done = command("recover", model, out, *options(texts, llama), "--json")
    assert done.code == 0, done.stderr
    training = done.json["training"]
    assert (training["ended"], training["best_step"], training["looks"][-1]["step"]) == ("nan", 2, 2)
    assert any("ended in NaN behind step 2" in warning for warning in done.json["warnings"])
    assert without_reports(out) != without_reports(model)


def test_what_does_not_get_better_ends_early_as_it_was(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    """The dense model is its own teacher: nothing is better than the start."""
    out = tmp_path / "out"
    how = ("--every", 1, "--epochs", 9, "--kl", 0, "--next-token", 1, "--rate", 0.1, "--json")
    done = command("recover", llama, out, *options(texts, llama), *how)
    assert done.code == 0, done.stderr
    training = done.json["training"]
    assert (training["ended"], training["best_step"], len(training["looks"])) == ("early", 0, 6)
    assert training["looks"][0]["held_out"] == pytest.approx(0, abs=1e-5)
    assert {name: value.tolist() for name, value in weights(out).items()} == {
        name: value.tolist() for name, value in weights(llama).items()
    }


def test_every_kind_of_model_trains(tmp_path: Path, command: RunCommand) -> None:
    """A model without a block, padded text and 16 bits; fewer experts."""
    rows = [row[: 12 + index].tolist() for index, row in enumerate(token_ids(5))]
    mask = torch.tensor([[1] * len(row) + [0] * (24 - len(row)) for row in rows])
    ids = torch.tensor([row + [0] * (24 - len(row)) for row in rows])
    fit = tmp_path / "padded.safetensors"
    save_file({"input_ids": ids, "attention_mask": mask}, fit)
    judge = tmp_path / "judge.safetensors"
    save_file({"input_ids": token_ids(3, samples=2)}, judge)
    often = ("--batch-size", 5, "--epochs", 8)
    for architecture, how, more in (
        ("qwen3", ("-m", "depth", "-o", "which=1", "-o", "refit=none"), ("--square-head", 1, "--dtype", "bfloat16")),
        ("mixtral", ("-m", "experts", "-o", "keep=2", "--calibration", fit), ()),
    ):
        dense = save_tiny(tmp_path / architecture, architecture, dtype=torch.bfloat16, shards=False)
        model = pruned(dense, tmp_path / f"{architecture}-pruned", command, *how)
        out = tmp_path / f"{architecture}-out"
        done = command("recover", model, out, *options((fit, judge), dense), *more, *often, "--json")
        assert done.code == 0, done.stderr
        training = done.json["training"]
        assert training["looks"][-1]["loss"] < training["looks"][1]["loss"]
        assert training["looks"][1]["tokens"] == 2 * int(mask[:5].sum())
        assert command("verify", out, "--against", model).code == 0


def test_refusals(llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"

    def not_taken(*arguments: object) -> str:
        done = command("recover", llama, out, *options(texts, llama), *arguments)
        assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert not out.exists()
        assert not partial_folder(out).exists()
        return done.stderr

    assert "--every is for --how full, not for --how block" in not_taken("--how", "block")
    assert "give one of them" in not_taken("--tokens", 5, "--epochs", 1)
    assert "--kl is -1, but a loss weighs 0 or more" in not_taken("--kl", -1)
    assert "there is nothing to train for" in not_taken("--kl", 0)
    assert "--top-k is 0" in not_taken("--top-k", 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "holds mine.txt, which is no part of a store" in not_taken("--store", tmp_path / "full")
