"""`-m experts -o after=`: what makes up for the experts that went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from methods.structured._expert_merge import averaged, groups, likeness
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.structured.moe import merge_experts
from prune_cli.structured.moe.expert_matrices import ExpertMatrices
from tests import reference_experts
from tests.broken import refused
from tests.conftest import RunCommand, folder_bytes, token_ids
from tests.tiny import load_plain, save_tiny

KINDS = ("mixtral", "gpt_oss", "deepseek_v3", "llama4_text")
SAMPLES, LENGTH = 16, 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.safetensors"
    save_file({"input_ids": token_ids(samples=SAMPLES, length=LENGTH)}, file)
    return file


def report_of(folder: Path) -> Any:
    return json.loads((folder / "prune_report.json").read_text())


def calls_in(model: Any, block: int, ids: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
    """The experts of a block, and what they are called with: hidden states, chosen experts, gates."""
    module = next(iter(reference_experts.experts_of(model.model.layers[block]).values()))
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.extend(args))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    return module, [each.flatten(0, -2).double() for each in seen]


def inputs_of(module: Any, call: list[torch.Tensor], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, in) of gate x inner, with a column for a bias, 0 where a token goes elsewhere; and (in, hidden)."""
    hidden, chosen, gates = call
    first = reference_experts.matrix(module, "gate_up_proj", expert).double()
    weight, biased = reference_experts.matrix(module, "down_proj", expert).double(), hasattr(module, "down_proj_bias")
    inner = reference_experts.activation(module, hidden, first, expert)
    if biased:
        inner = torch.cat([inner, torch.ones(len(inner), 1)], 1)
        weight = torch.cat([weight, module.down_proj_bias[expert].double()[:, None]], 1)
    return inner * torch.where(chosen == expert, gates, 0.0).sum(-1, keepdim=True), weight.T


def error_of(outputs: torch.Tensor, wanted: torch.Tensor, held_out: slice) -> float:
    return float((outputs - wanted)[held_out].square().sum() / wanted[held_out].square().sum())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_a_refit_is_the_least_squares_of_one_expert_after_the_other(
    kind: str, models: dict[str, Path], text: Path, tmp_path: Path, command: RunCommand
) -> None:
    """In float64, with the whole matrices: sweeps over the experts of the first block with any."""
    arguments = ["-m", "experts", "-s", "0.5", "--calibration", text, "-q"]
    assert command("prune", models[kind], tmp_path / "plain", *arguments).code == 0
    assert command("prune", models[kind], tmp_path / "out", *arguments, "-o", "after=refit").code == 0
    first = report_of(tmp_path / "out")["matched"][0]
    ids, block = token_ids(samples=SAMPLES, length=LENGTH), first["block"]
    dense, call = calls_in(load_plain(models[kind]), block, ids)
    wanted = sum((x @ w for x, w in (inputs_of(dense, call, e) for e in range(dense.num_experts))), torch.zeros(()))
    small, call = calls_in(load_plain(tmp_path / "plain"), block, ids)
    made, weights = map(list, zip(*(inputs_of(small, call, e) for e in range(small.num_experts)), strict=True))
    fitted, held_out = slice(0, (SAMPLES - 2) * LENGTH), slice((SAMPLES - 2) * LENGTH, None)

    def outputs() -> torch.Tensor:
        return sum((x @ w for x, w in zip(made, weights, strict=True)), torch.zeros(()))

    assert first["error_before"] == pytest.approx(error_of(outputs(), wanted, held_out), rel=1e-4)
    errors, best = [], [each.clone() for each in weights]
    for _ in range(len(first["epochs"])):
        for expert, x in enumerate(made):
            x, lacking = x[fitted], (wanted - outputs() + x @ weights[expert])[fitted]
            pull = 0.01 * torch.diag((x.T @ x).diagonal().clamp_min(1e-12))
            weights[expert] = torch.linalg.solve(x.T @ x + pull, x.T @ lacking + pull @ weights[expert])
        errors.append(error_of(outputs(), wanted, held_out))
        if errors[-1] == min([first["error_before"], *errors]):
            best = [each.clone() for each in weights]
    assert first["epochs"] == pytest.approx(errors, rel=1e-2)
    assert first["error_after"] == min([first["error_before"], *first["epochs"]])
    found, _ = calls_in(load_plain(tmp_path / "out"), block, ids)
    for expert, weight in enumerate(best):
        got = reference_experts.matrix(found, "down_proj", expert).double()
        torch.testing.assert_close(got, weight.T[:, : got.shape[1]], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("kind", "after"), [("deepseek_v3", "merge"), ("llama4_text", "router")])
@torch.no_grad()
def test_only_what_lowers_the_held_out_error_is_written(
    kind: str, after: str, models: dict[str, Path], text: Path, tmp_path: Path, command: RunCommand
) -> None:
    arguments = ["-m", "experts", "-s", "0.5", "--calibration", text, "-o", f"after={after}"]
    told = command("prune", models[kind], tmp_path / "out", *arguments, "--dry-run", "--json").json
    assert f"-o after={after} then takes both models through the text" in told["how"]
    assert command("prune", models[kind], tmp_path / "out", *arguments, "-q").code == 0
    report = report_of(tmp_path / "out")
    assert report["matched"]
    assert f"-o after={after}: squared error on held-out samples" in report["structure"]["notes"][-1]
    changed = {each["block"] for each in report["tensors"] if each["action"] == "refitted"}
    fitted = {each["block"] for each in report["matched"] if each["best_epoch"]}
    assert changed <= fitted
    assert all(each["error_after"] <= each["error_before"] for each in report["matched"])
    assert load_plain(tmp_path / "out")(input_ids=token_ids()).logits.isfinite().all()


def test_a_run_goes_on_after_a_kill(
    models: dict[str, Path], text: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of writing a block: its bytes are partly there, its line is not."""
    arguments = ["-m", "experts", "-s", "0.25", "--calibration", text, "-o", "after=refit", "-q"]
    assert command("prune", models["gpt_oss"], tmp_path / "whole", *arguments).code == 0
    append = OutputFolder._write_block  # pyright: ignore[reportPrivateUsage]

    def stop(self: OutputFolder, block: int, tensors: Any, record: Any) -> None:
        if block == 1 and "matched" in record:
            for name, tensor in tensors.items():
                self._overwrite(self.layout.entries[name], torch.ones_like(tensor))  # pyright: ignore[reportPrivateUsage]
            raise KeyboardInterrupt
        append(self, block, tensors, record)

    monkeypatch.setattr(OutputFolder, "_write_block", stop)
    assert command("prune", models["gpt_oss"], tmp_path / "out", *arguments).code == 130
    monkeypatch.undo()
    assert command("prune", models["gpt_oss"], tmp_path / "out", *arguments, "--resume").code == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_what_cannot_be_made_up_for_is_refused(
    models: dict[str, Path], text: Path, tmp_path: Path, command: RunCommand
) -> None:
    def message(kind: str, after: str, *options: object, calibration: Path = text) -> str:
        arguments = ["-m", "experts", "-o", f"after={after}", "--calibration", calibration, *options]
        return refused(command, models[kind], tmp_path / "out", *arguments)

    assert "gets rows of zeros for all others instead: use -o after=router" in message("llama4_text", "refit")
    save_file({"input_ids": token_ids(samples=1)}, tmp_path / "one.safetensors")
    assert "needs at least 2, of which one is held out" in message(
        "mixtral", "refit", calibration=tmp_path / "one.safetensors"
    )
    keep = ["-o", f"save_keep_list={tmp_path / 'keep.json'}", "--keep-list-only"]
    assert "leave -o after=merge out" in message("mixtral", "merge", *keep)


def test_experts_join_their_likes_until_a_group_is_full() -> None:
    outputs = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]])
    like = likeness(outputs, outputs.flip(0).flip(1))
    assert torch.allclose(like.diagonal(), torch.ones(4, dtype=torch.float64))
    assert groups(like, [0, 1]) == {0: [2], 1: [3]}
    assert [len(each) for each in groups(torch.ones(40, 40), [3, 5]).values()] == [15, 15]
    mean = averaged({"a": [torch.tensor([1.0]), torch.tensor([4.0])]}, [2.0, 1.0])
    assert mean["a"].tolist() == pytest.approx([2.0])
    assert averaged({"a": [torch.tensor([1.0]), torch.tensor([4.0])]}, [0.0, 0.0])["a"].tolist() == [2.5]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_an_expert_with_its_units_in_another_order_is_the_same(kind: str, models: dict[str, Path]) -> None:
    """Expert 1 becomes expert 0 with its units shuffled: the average of both computes what expert 0 did."""
    model = StreamedModel(
        models[kind], Checkpoint.open(models[kind]), dtype=torch.float32, device=torch.device("cpu"),
        trust_remote_code=False,
    )  # fmt: skip
    matrices = ExpertMatrices(model, 1, model.load_block(1, model.checkpoint))
    module: Any = next(iter(reference_experts.experts_of(model.blocks[1]).values()))
    interleaved = not module.is_concatenated
    rows = torch.randn(7, model.hidden_size, generator=torch.Generator().manual_seed(0))
    before = output_of(module, 0, rows)
    units = merge_experts._units(matrices, 0, interleaved)  # pyright: ignore[reportPrivateUsage]
    order = torch.randperm(len(units["down"]), generator=torch.Generator().manual_seed(1))
    shuffled = {name: part if name == "down bias" else part[order] for name, part in units.items()}
    merge_experts._put(matrices, 1, shuffled, interleaved)  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(output_of(module, 1, rows), before)
    of_all = merge_experts._in_one_order(  # pyright: ignore[reportPrivateUsage]
        [merge_experts._units(matrices, expert, interleaved) for expert in (0, 1)]  # pyright: ignore[reportPrivateUsage]
    )
    for one, other in of_all.values():
        torch.testing.assert_close(one, other)
    merge_experts._put(matrices, 1, averaged(of_all, [1.0, 3.0]), interleaved)  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(output_of(module, 1, rows), before)


def output_of(module: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    first, last = (reference_experts.matrix(module, name, expert) for name in ("gate_up_proj", "down_proj"))
    bias = module.down_proj_bias[expert] if hasattr(module, "down_proj_bias") else None
    return nn.functional.linear(reference_experts.activation(module, rows, first, expert), last, bias)
