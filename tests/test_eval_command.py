"""`prune-cli eval` against naive computations on whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prune_cli.report.memory import MemoryPlan
from tests import reference
from tests.conftest import RunCommand, token_ids
from tests.tiny import load_plain, save_tiny


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama-untied", "gemma2", "gpt2", "mamba"])
def test_perplexity_is_that_of_the_whole_model(
    kind: str, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", kind)
    outcome = command("eval", model, "--data", tokens_file, "--json", "--batch-size", 4)
    assert outcome.code == 0, outcome.stderr
    result = outcome.json
    assert result["evaluation"]["perplexity"] == pytest.approx(
        reference.perplexity(load_plain(model), token_ids()), rel=1e-5
    )
    assert result["evaluation"]["windows"] == 6
    assert result["evaluation"]["predicted_tokens"] == 6 * 23
    assert result["comparison"] is None


@torch.no_grad()
def test_comparison_with_a_dense_model(llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    assert command("prune", llama, out, "-m", "magnitude", "-s", 0.7, "-q").code == 0
    outcome = command("eval", out, "--against", llama, "--data", tokens_file, "--json")
    result = outcome.json["comparison"]
    ids = token_ids()
    ours, dense = (load_plain(folder)(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for folder in (out, llama))
    kl = (dense.exp() * (dense - ours)).sum(-1).mean()
    losses = [-logits.gather(-1, ids[:, 1:, None]).mean((1, 2)) for logits in (ours, dense)]
    increase = losses[0] - losses[1]
    assert result["kl_from_dense"] == pytest.approx(float(kl), rel=1e-4)
    assert result["top1_agreement"] == pytest.approx(float((ours.argmax(-1) == dense.argmax(-1)).double().mean()))
    assert result["loss_increase"] == pytest.approx(float(increase.mean()), rel=1e-4)
    assert result["loss_increase_standard_error"] == pytest.approx(float(increase.std() / 6**0.5), rel=1e-3)
    assert result["model"]["loss"] - result["dense"]["loss"] == pytest.approx(result["loss_increase"])
    table = command("eval", out, "--against", llama, "--data", tokens_file)
    assert "same first choice" in table.stdout


def test_a_model_against_itself(llama: Path, tokens_file: Path, command: RunCommand) -> None:
    result = command("eval", llama, "--against", llama, "--data", tokens_file, "--json").json["comparison"]
    assert result["kl_from_dense"] == 0
    assert result["top1_agreement"] == 1
    assert result["loss_increase"] == 0


def test_models_with_other_vocabularies_are_refused(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    other = save_tiny(tmp_path / "other", "llama-untied", vocab_size=160)
    refused = command("eval", llama, "--against", other, "--data", tokens_file)
    assert refused.code == 2
    assert "128 and 160 tokens" in refused.stderr


@torch.no_grad()
def test_many_windows_in_several_passes(
    llama: Path, tokens_file: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command("eval", llama, "--data", tokens_file, "--json", "--batch-size", 2).json
    assert whole["memory"] is None
    few = MemoryPlan(True, 1, None, 1, None, hidden_states=0)
    monkeypatch.setattr("prune_cli.evaluation.perplexity.fitted", lambda *_: (few, ()))
    passes = command("eval", llama, "--data", tokens_file, "--json", "--batch-size", 2).json
    assert whole["evaluation"] == passes["evaluation"]
    assert passes["memory"]["hidden_states"] == 0


def test_windows_are_drawn_with_the_seed(llama: Path, tokens_file: Path, command: RunCommand) -> None:
    result = command("eval", llama, "--data", tokens_file, "--eval-windows", 2, "--seed", 3, "--json").json
    rows = torch.randperm(6, generator=torch.Generator().manual_seed(3))[:2].sort().values
    assert (result["evaluation"]["windows"], result["text"]["seed"]) == (2, 3)
    assert "2 of the 6 windows, drawn with the seed" in result["text"]["protocol"]
    assert result["evaluation"]["perplexity"] == pytest.approx(
        reference.perplexity(load_plain(llama), token_ids()[rows]), rel=1e-5
    )
    everything = command("eval", llama, "--data", tokens_file, "--samples", 7, "--json").json
    assert (
        everything["text"]["sha256"] == command("eval", llama, "--data", tokens_file, "--json").json["text"]["sha256"]
    )
