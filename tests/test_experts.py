"""Experts' matrices in the methods that make zeros: few tokens, steps, targets, patterns, allocation, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods._method import Pruned
from methods._pattern import Unstructured
from methods.steps import load_step
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.model.streamed_model import StreamedModel
from tests import reference, reference_experts
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.tiny import load_plain, save_tiny


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("moe")
    return {kind: save_tiny(folder / kind, kind) for kind in ("mixtral", "olmoe", "gpt_oss", "granitemoe")}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "granitemoe"])
def test_every_part_of_the_parameters_is_told(kind: str, models: dict[str, Path]) -> None:
    """Each stored matrix is found where transformers' own loading puts it."""
    checkpoint = Checkpoint.open(models[kind])
    model = StreamedModel(
        models[kind], checkpoint, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False
    )
    plain = dict(load_plain(models[kind]).named_parameters())
    covered = {name: torch.zeros(parameter.shape) for name, parameter in plain.items()}
    for name, info in model.tensor_map.items():
        if info.expert is not None and info.parameter is not None:
            stored, part = checkpoint.read(name), info.expert
            for expert in range(part.experts) if part.index is None else [part.index]:
                matrix = stored[expert] if part.index is None else stored
                at = slice(part.first, part.first + len(matrix))
                assert torch.equal(plain[info.parameter][expert][at], matrix)
                covered[info.parameter][expert][at] += 1
    experts = {info.parameter for info in model.tensor_map.values() if info.role == "expert"}
    assert experts
    assert all(bool((covered[parameter or ""] == 1).all()) for parameter in experts)


def test_experts_with_few_tokens_are_pruned_by_all_and_told(
    models: dict[str, Path], tmp_path: Path, command: RunCommand
) -> None:
    """16 tokens, 8 experts, two each: all are below the limit, and count what all tokens would give them."""
    save_file({"input_ids": token_ids(samples=1, length=16)}, tmp_path / "few.safetensors")
    run = command("prune", models["olmoe"], tmp_path / "out", "--calibration", tmp_path / "few.safetensors", "--json")
    assert run.code == 0, run.stderr
    report = {t["name"]: t for t in run.json["tensors"] if t["role"] == "expert"}
    model = load_plain(tmp_path / "out")
    experts = model.model.layers[0].mlp.experts
    ((hidden, chosen),) = reference_experts.calls_of(model, [token_ids(samples=1, length=16)], experts)
    dense = tensors_of(models["olmoe"])
    for expert in range(8):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        count = sum(expert in row for row in chosen.tolist())
        start = f"only {count} calibration tokens were sent to this expert"
        assert [note for note in report[name]["notes"] if note.startswith(start)]
        score = reference.wanda_score(dense[name], hidden.double().pow(2).sum(0).float())
        assert torch.equal(tensors_of(tmp_path / "out")[name] != 0, reference.keep_per_row(score, 0.5))


@torch.no_grad()
def test_dense_targets_follow_the_dense_expert(models: dict[str, Path], tmp_path: Path, command: RunCommand) -> None:
    """The last map of an expert, refitted to what the dense expert makes of the dense hidden states."""
    ids = token_ids(samples=8, length=48)
    save_file({"input_ids": ids}, tmp_path / "text.safetensors")
    run = command(
        "prune", models["mixtral"], tmp_path / "out", "-m", "wanda", "--reconstruct", "--target", "dense",
        "--calibration", tmp_path / "text.safetensors", "--batch-size", 8, "--json",
    )  # fmt: skip
    assert run.code == 0, run.stderr
    pruned, dense = load_plain(tmp_path / "out"), load_plain(models["mixtral"])
    module, other = pruned.model.layers[0].mlp.experts, dense.model.layers[0].mlp.experts
    ((hidden, chosen),) = reference_experts.calls_of(pruned, [ids], module)
    ((source, _),) = reference_experts.calls_of(dense, [ids], other)
    for expert in range(4):
        mine = torch.tensor([expert in row for row in chosen.tolist()])
        first, original = (reference_experts.matrix(m, "gate_up_proj", expert) for m in (module, other))
        x = reference_experts.activation(module, hidden[mine], first, expert)
        y = reference_experts.activation(other, source[mine], original, expert)
        weight = reference_experts.matrix(other, "down_proj", expert)
        keep = reference.keep_per_row(reference.wanda_score(weight, x.double().pow(2).sum(0).float()), 0.5)
        step = load_step("reconstruct")
        known = {"gram": x.T @ x, "cross": y.T @ x, "sq_norm": x.square().sum(0)}
        wanted = step.improve(weight, _kept(weight, keep), known, Unstructured(0.5), step.options()).weight
        got = reference_experts.matrix(module, "down_proj", expert)
        assert torch.equal(got != 0, keep)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def _kept(weight: torch.Tensor, keep: torch.Tensor) -> Pruned:
    return Pruned(torch.where(keep, weight, torch.zeros_like(weight)), keep)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("gpt_oss", ["-m", "magnitude", "--pattern", "2:4"]),
        ("granitemoe", ["-m", "admm", "--target", "dense", "--pattern", "2:4"]),
        ("gpt_oss", ["-m", "sparsegpt", "--calibrate-by", "block", "--pattern", "2:4"]),
    ],
)
def test_patterns_lie_along_the_inputs(
    kind: str, arguments: list[str], models: dict[str, Path], tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    text = [] if "magnitude" in arguments else ["--calibration", tokens_file]
    assert command("prune", models[kind], tmp_path / "out", *arguments, *text, "-q").code == 0
    for block in load_plain(tmp_path / "out").model.layers:
        for module in reference_experts.experts_of(block).values():
            for name in ("gate_up_proj", "down_proj"):
                kept = reference_experts.matrix(module, name, 1).reshape(-1, 4).count_nonzero(dim=1)
                assert int(kept.max()) == int(kept.min()) == 2


@pytest.mark.parametrize("how", ["erk", "owl", "global", "atp"])
def test_allocations_keep_the_budget(
    how: str, models: dict[str, Path], tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    kind = "granitemoe" if how in ("erk", "owl") else "mixtral"
    run = command("prune", models[kind], tmp_path / "out", "--calibration", tokens_file, "--allocate", how, "--json")
    assert run.code == 0, run.stderr
    assert run.json["totals"]["sparsity_of_pruned"] == pytest.approx(0.5, abs=0.02)
    shares = {t["asked_sparsity"] for t in run.json["tensors"] if t["role"] == "expert"}
    assert how == "atp" or len(shares) > 1


def test_experts_without_a_list_of_their_tokens_follow_their_own_outputs(
    tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", "llama4_text")
    run = command(
        "prune", model, tmp_path / "out", "-m", "admm", "--target", "dense", "--calibration", tokens_file, "--json"
    )
    assert run.code == 0, run.stderr
    notes = [t["notes"] for t in run.json["tensors"] if t["role"] == "expert"]
    assert all("expert 0: follows its own dense outputs" in " ".join(each) for each in notes)


def test_a_run_goes_on_after_a_kill(
    models: dict[str, Path], tokens_file: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_cli.checkpoint.output_folder import OutputFolder

    arguments = ["--calibration", tokens_file, "-m", "admm", "--target", "dense", "-q"]
    assert command("prune", models["gpt_oss"], tmp_path / "whole", *arguments).code == 0
    write = OutputFolder.write_block

    def stop(self: OutputFolder, block: int, *rest: object) -> None:
        if block == 1:
            raise KeyboardInterrupt
        write(self, block, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(OutputFolder, "write_block", stop)
    assert command("prune", models["gpt_oss"], tmp_path / "out", *arguments).code == 130
    monkeypatch.undo()
    assert command("prune", models["gpt_oss"], tmp_path / "out", *arguments, "--resume").code == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
