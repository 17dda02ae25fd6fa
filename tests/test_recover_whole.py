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

from methods._block_matching import rms_of_kept, width_of
from methods._distillation import divergence, log_masses, most_probable, square_head
from prune_cli import prune
from prune_cli.checkpoint import whole_file
from prune_cli.checkpoint.file_names import partial_folder
from prune_cli.engine.seeds import seed_of
from prune_cli.recovery.end_to_end import Course, EndToEnd
from prune_cli.recovery.read import read_recovery
from prune_cli.recovery.report import recovery_schema
from prune_cli.recovery.trained_weights import LowRankUpdates, part_of
from tests.calibration_texts import drawn_rows
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.reference import divergence_of_buckets
from tests.test_engine import open_skeleton
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


@pytest.fixture(scope="module")
def sparse(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of `llama` is zero; never written to."""
    out = tmp_path_factory.mktemp("sparse") / "pruned"
    prune(llama, out, method="magnitude")
    return out


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
    drawn = drawn_rows(texts[0], 10)
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
    llama: Path, sparse: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    model, out = sparse, tmp_path / "out"
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
    llama: Path, sparse: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    """Also with the hidden states, activations computed again, and the store of the run before."""
    model, out, store = sparse, tmp_path / "out", tmp_path / "store"
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
    original = whole_file.save_file

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        head = json.loads(next(iter(metadata.values())))
        if "done" in head and head["done"]["looks"][-1]["step"] == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path, metadata)

    monkeypatch.setattr(whole_file, "save_file", save)


def test_nan_ends_the_training_and_the_best_is_kept(
    llama: Path, sparse: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    model, out = sparse, tmp_path / "out"
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


def test_a_shallower_model_trains_on_padded_text_in_16_bits(tmp_path: Path, command: RunCommand) -> None:
    rows = [row[: 12 + index].tolist() for index, row in enumerate(token_ids(5))]
    mask = torch.tensor([[1] * len(row) + [0] * (24 - len(row)) for row in rows])
    fit, judge = tmp_path / "padded.safetensors", tmp_path / "judge.safetensors"
    save_file({"input_ids": torch.tensor([row + [0] * (24 - len(row)) for row in rows]), "attention_mask": mask}, fit)
    save_file({"input_ids": token_ids(3, samples=2)}, judge)
    dense = save_tiny(tmp_path / "dense", "qwen3", dtype=torch.bfloat16, shards=False)
    model = pruned(dense, tmp_path / "pruned", command, "-m", "depth", "-o", "which=1", "-o", "refit=none")
    how = ("--square-head", 1, "--dtype", "bfloat16", "--batch-size", 5, "--epochs", 8, "--json")
    done = command("recover", model, tmp_path / "out", *options((fit, judge), dense), *how)
    assert done.code == 0, done.stderr
    looks = done.json["training"]["looks"]
    assert looks[-1]["loss"] < looks[1]["loss"]
    assert looks[1]["tokens"] == 2 * int(mask[:5].sum())
    # Of two blocks: the states of the dense ones behind the removed one and behind the last.
    assert done.json["training"]["teacher_bytes"] == 50 * 2 + 51 * 2 + 2 * 2 * 32
    assert command("verify", tmp_path / "out", "--against", model).code == 0


@pytest.mark.parametrize("stacked", [(), (3,)], ids=["matrix", "experts"])
def test_low_rank_updates_have_the_gradients_of_what_they_fold_into(stacked: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    start = torch.randn(*stacked, 6, 5) * (torch.rand(*stacked, 6, 5) > 0.5)
    gain = torch.nn.Parameter(torch.ones(5))
    weight = torch.nn.Parameter(start.clone())
    updates = LowRankUpdates({"w": weight, "gain": gain}, rank=2, seed=0)
    assert set(updates.optimised) == {"w.A", "w.B", "gain"}
    a, b = updates.optimised["w.A"], updates.optimised["w.B"]
    torch.nn.init.normal_(b)
    updates.apply()
    x = torch.randn(4, 5)
    expected = (torch.where(start != 0, start + b @ a, 0.0) @ (x * gain).T).square().sum()
    wanted = torch.autograd.grad(expected, (a, b, gain))
    (weight @ (x * gain).T).square().sum().backward()
    updates.take_gradients()
    for parameter, gradient in zip((a, b, gain), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert weight.grad is None


def test_low_rank_updates_fold_into_what_was_named(
    llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand
) -> None:
    """A dense student, whose updates have the rank that was asked for; a run that was stopped gives the same."""
    teacher = save_tiny(tmp_path / "teacher", "llama-untied", seed=1)
    how = [*options(texts, teacher), "--how", "lora", "--rank", 2, "--train", "norms,attention", "--epochs", 2]
    expected = tmp_path / "expected"
    done = command("recover", llama, expected, *how, "--json")
    assert done.code == 0, done.stderr
    before, after = weights(llama), weights(expected)
    for tensor in done.json["tensors"]:
        name = tensor["name"]
        moved = after[name] - before[name]
        trained = ".self_attn." in name or (".layers." in name and "norm" in name)
        assert (tensor["action"] == "trained") == trained == bool(moved.any()), tensor
        if ".self_attn." in name:
            values = torch.linalg.svdvals(moved.double())
            assert float(values[2]) < 1e-5 < 1e-3 < float(values[1]), name
    assert "belongs to mlp, which --train does not name" in {tensor["reason"] for tensor in done.json["tensors"]}

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        fill_the_disk(patch, 6)
        assert command("recover", llama, out, *how).code == 1
    assert command("recover", llama, out, *how, "--resume").code == 0
    assert without_reports(out) == without_reports(expected)


@pytest.mark.parametrize("architecture", ["gpt_neox", "opt", "lfm2", "mamba"])
def test_parts_are_told_from_names(architecture: str, tmp_path: Path) -> None:
    model = open_skeleton(save_tiny(tmp_path / "model", architecture))
    found = {name.partition(".0.")[2]: part_of(info) for name, info in model.tensor_map.items() if info.block == 0}
    expected = {
        "gpt_neox": {"attention.query_key_value.weight": "attention", "mlp.dense_h_to_4h.weight": "mlp"},
        "opt": {"self_attn.out_proj.weight": "attention", "fc1.weight": "mlp", "fc1.bias": "biases"},
        "lfm2": {"self_attn.out_proj.weight": "attention", "feed_forward.w1.weight": "mlp", "ffn_norm.weight": "norms"},
        "mamba": {"mixer.in_proj.weight": "attention", "norm.weight": "norms"},
    }[architecture]
    assert {name: found[name] for name in expected} == expected


@pytest.mark.drawn
def test_routers_alone_win_back(texts: tuple[Path, Path], tmp_path: Path, command: RunCommand) -> None:
    dense = save_tiny(tmp_path / "dense", "mixtral", dtype=torch.bfloat16, shards=False)
    model = pruned(dense, tmp_path / "pruned", command, "-m", "experts", "-o", "keep=2", "--calibration", texts[0])
    out = tmp_path / "out"
    how = ("--how", "router", "--batch-size", 9, "--every", 1, "--rate", 0.05, "--json")
    done = command("recover", model, out, *options(texts, dense), *how)
    assert done.code == 0, done.stderr
    looks = done.json["training"]["looks"]
    assert looks[-1]["loss"] < looks[1]["loss"]
    before, after = weights(model), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    moved = {tensor["name"] for tensor in done.json["tensors"] if tensor["action"] == "trained"}
    assert changed <= moved == {name for name in before if name.endswith(".gate.weight")}


def test_refusals(llama: Path, texts: tuple[Path, Path], tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"

    def not_taken(*arguments: object) -> str:
        done = command("recover", llama, out, *options(texts, llama), *arguments)
        assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert not out.exists()
        assert not partial_folder(out).exists()
        return done.stderr

    assert "--every is for --how full, lora and router, not" in not_taken("--how", "block")
    assert "give one of them" in not_taken("--tokens", 5, "--epochs", 1)
    assert "--kl is -1, but a loss weighs 0 or more" in not_taken("--kl", -1)
    assert "there is nothing to train for" in not_taken("--kl", 0)
    assert "--top-k is 0" in not_taken("--top-k", 0)
    assert "--rank is for --how lora" in not_taken("--rank", 4)
    assert "--train has 'mlps': choose of norms, biases, attention, mlp, or all" in not_taken("--train", "mlps")
    assert "trains routers alone" in not_taken("--how", "router", "--train", "norms")
    assert "has no routers in its blocks that can be trained" in not_taken("--how", "router")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "holds mine.txt, which is no part of a store" in not_taken("--store", tmp_path / "full")
