"""Windows that the dense model samples: beside a plain forward, and as the calibration text of a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import methods.admm as admm
from calibration.batch import Batch
from methods._pattern import Unstructured
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.activation_budget import Batching
from prune_cli.engine.self_calibration import copies_for, sample_windows
from prune_cli.errors import PruneError
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.progress import Silent
from tests.conftest import LENGTH, SAMPLES, RunCommand, token_ids


def _streamed(folder: Path) -> StreamedModel:
    return StreamedModel(
        folder, Checkpoint.open(folder), dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False
    )


@torch.no_grad()
def _reference(model: Any, ids: torch.Tensor, copies: int, seed: int) -> torch.Tensor:
    """One window after the other through plain transformers."""
    generator = torch.Generator().manual_seed(seed)
    found = [ids.clone() for _ in range(copies)]
    for row, window in enumerate(ids):
        probabilities = model(window[None]).logits[0, :-1].softmax(-1)
        drawn = torch.multinomial(probabilities, copies, replacement=True, generator=generator)
        for copy in range(copies):
            found[copy][row, 1:] = drawn[:, copy]
    return torch.cat(found)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_token_is_sampled_by_the_dense_model_after_the_text_before_it(llama: Path, batch_size: int) -> None:
    ids = token_ids()
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    sampled = sample_windows(_streamed(llama), Batch(ids), 2, Batching(batch_size), 7, Silent())
    assert torch.equal(sampled, _reference(model, ids, 2, 7))
    assert torch.equal(sampled[:, 0], ids[:, 0].repeat(2))
    assert not torch.equal(sampled[:SAMPLES], sampled[SAMPLES:])


def test_predictions_that_are_not_finite_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _streamed(llama)
    monkeypatch.setattr(torch.Tensor, "softmax", lambda logits, _: logits * float("nan"))
    with pytest.raises(PruneError, match="predictions are not finite"):
        sample_windows(model, Batch(token_ids()), 1, Batching(2), 0, Silent())


@pytest.mark.parametrize("options", [["-m", "wanda"], ["-m", "admm", "--target", "dense"]])
def test_a_run_is_that_on_the_given_and_the_sampled_windows(
    llama: Path, tokens_file: Path, tmp_path: Path, command: RunCommand, options: list[str]
) -> None:
    more = sample_windows(_streamed(llama), Batch(token_ids()), 2, Batching(1), 0, Silent())
    save_file({"input_ids": torch.cat([token_ids(), more])}, tmp_path / "all.safetensors")
    shared = [*options, "-s", 0.5, "--json", "-q", "--batch-size", 1]
    extended = command("prune", llama, tmp_path / "a", *shared, "--calibration", tokens_file, "--self-calibration", 2)
    stored = command("prune", llama, tmp_path / "b", *shared, "--calibration", tmp_path / "all.safetensors")
    plain = command("prune", llama, tmp_path / "c", *shared, "--calibration", tokens_file)
    assert (extended.code, stored.code, plain.code) == (0, 0, 0)
    assert _weights(tmp_path / "a") == _weights(tmp_path / "b")
    assert _weights(tmp_path / "a") != _weights(tmp_path / "c")
    text = extended.json["calibration"]
    assert (text["samples"], text["tokens"]) == (3 * SAMPLES, 3 * SAMPLES * LENGTH)
    assert "sampled by the dense model" in text["protocol"]
    assert text["sha256"] == stored.json["calibration"]["sha256"]


def _weights(folder: Path) -> dict[str, list[Any]]:
    return {
        name: tensor.flatten().tolist()
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(("samples", "copies", "include"), [(22, 1, "*down_proj*"), (22, 0, "*q_proj*")])
def test_best_samples_where_inputs_of_the_widest_layer_have_fewer_than_16_tokens(
    llama: Path, tmp_path: Path, command: RunCommand, samples: int, copies: int, include: str
) -> None:
    """The widest layer has 64 inputs, q_proj 32; 528 tokens are given."""
    save_file({"input_ids": token_ids(samples=samples)}, tmp_path / "tokens.safetensors")
    shared = [
        "--preset",
        "best",
        "--calibration",
        tmp_path / "tokens.safetensors",
        "--include",
        include,
        "--json",
        "-q",
    ]
    plan = command("prune", llama, tmp_path / "out", *shared, "--dry-run").json
    assert (plan["calibration_tokens"], plan["sampled_tokens"]) == (
        (1 + copies) * samples * LENGTH,
        copies * samples * LENGTH,
    )
    shared += ["-o", "steps=1", "-o", "polish=0"]
    auto = command("prune", llama, tmp_path / "auto", *shared).json
    told = command("prune", llama, tmp_path / "told", *shared, "--self-calibration", copies).json
    assert _weights(tmp_path / "auto") == _weights(tmp_path / "told")
    assert auto["calibration"] == told["calibration"]
    assert auto["sampled"] == told["sampled"] == copies * samples
    assert ("self-calibration" in (tmp_path / "auto" / "README.md").read_text()) == (copies > 0)


def test_auto_adds_one_window_for_each_or_none() -> None:
    assert [copies_for(tokens, 100) for tokens in (1, 800, 1599, 1600)] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "magnitude", "--self-calibration", 1], "magnitude needs none: leave it out"),
        (["-m", "wanda", "--self-calibration", 65], "must be 0 to 64, or auto"),
        (["-m", "wanda", "--self-calibration", "some"], "must be a whole number or auto"),
        (["-m", "depth", "--self-calibration", 1], "--self-calibration is for methods that make weights sparse"),
    ],
)
def test_requests_that_mean_nothing_are_refused(
    llama: Path, tmp_path: Path, command: RunCommand, options: list[object], message: str
) -> None:
    outcome = command("prune", llama, tmp_path / "out", *options)
    assert outcome.code == 2
    assert message in " ".join(outcome.stderr.split())


@pytest.mark.parametrize(("tokens", "damping"), [(10_000, 0.03), (200, 0.12), (20, 0.3)])
def test_fewer_tokens_are_damped_more(tokens: int, damping: float) -> None:
    """16 inputs: 1.5 x 16 / tokens, within the least and 0.3."""
    generator = torch.Generator().manual_seed(3)
    weight, inputs = torch.randn(8, 16, generator=generator), torch.randn(60, 16, generator=generator)
    gram = inputs.T @ inputs
    with_tokens = {"gram": gram, "tokens": torch.tensor(float(tokens))}
    pattern = Unstructured(0.5)
    ruled = admm.prune(weight, with_tokens, pattern, admm.Options(), generator)
    told = admm.prune(weight, {"gram": gram}, pattern, admm.Options(damping=damping), generator)
    off = admm.prune(weight, with_tokens, pattern, admm.Options(shrinkage=0), generator)
    assert torch.allclose(ruled.weight, told.weight, atol=1e-6)
    assert torch.equal(off.weight, admm.prune(weight, {"gram": gram}, pattern, admm.Options(), generator).weight)
