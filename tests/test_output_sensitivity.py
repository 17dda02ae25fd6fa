"""--allocate sensitivity: derivatives beside plain transformers, and what comes of them in a whole run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import methods.admm as admm
from calibration.batch import Batch
from methods._allocation import output_scores
from methods._pattern import Unstructured
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.output_sensitivity import output_sensitivity
from prune_cli.engine.seeds import seed_of
from prune_cli.engine.stream import Stream
from prune_cli.model.streamed_model import StreamedModel
from tests.conftest import RunCommand, token_ids
from tests.tiny import load_plain

_BLOCK = 1


def _reference(folder: Path, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Zeros that are added to every output of the block's linear layers, and the derivatives by them."""
    model: Any = load_plain(folder)
    layer, zeros, inputs, states = model.model.layers[_BLOCK], {}, {}, []

    def add_zeros(name: str, _: Any, arguments: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        inputs[name], zeros[name] = arguments[0].detach(), torch.zeros_like(output).requires_grad_()
        return output + zeros[name]

    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(partial(add_zeros, f"model.layers.{_BLOCK}.{name}.weight"))
    layer.register_forward_hook(lambda _, __, output: states.append(output[0] if isinstance(output, tuple) else output))
    model(ids)
    output = states[0].reshape(-1, states[0].shape[-1])
    generator = torch.Generator().manual_seed(seed_of(f"sensitivity of block {_BLOCK}", 0))
    r = torch.randn(output.shape, generator=generator) / output.detach().square().mean(1, keepdim=True).sqrt()
    (output * r).sum().backward()
    return {
        name: (zero.grad.flatten(0, 1).square().sum(0), inputs[name].flatten(0, 1).square().sum(0))
        for name, zero in zeros.items()
    }


def test_sensitivities_are_the_derivatives_of_the_plain_block(llama: Path) -> None:
    ids = token_ids()
    model = StreamedModel(
        llama, Checkpoint.open(llama), dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False
    )
    with torch.no_grad(), Stream(model, [Batch(ids)]) as stream:
        for block in range(_BLOCK):
            stream.load(block)
            stream.run_block(block)
        stream.load(_BLOCK)
        names = model.linear_layers(_BLOCK)
        assert output_sensitivity(stream, _BLOCK, [], [Batch(ids)], 0) == {}
        found = output_sensitivity(stream, _BLOCK, names, [Batch(ids)], 0)
    expected = _reference(llama, ids)
    assert set(found) == set(names) == set(expected)
    for name, (outputs, inputs) in expected.items():
        torch.testing.assert_close(found[name].outputs, outputs, rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(found[name].inputs, inputs, rtol=1e-4, atol=1e-8)


def test_scores_are_wandas_squared_times_the_shrunk_sensitivity() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    scores = output_scores(weight, torch.tensor([1.0, 4.0]), torch.tensor([10.0, 1.0]))
    mine = [0.8 * each + 0.2 * 2.5 for each in (1.0, 4.0)]
    assert torch.allclose(scores, torch.tensor([[10 * mine[0], 4 * mine[0]], [90 * mine[1], 0.0]]))


def test_rows_that_matter_more_are_pruned_as_if_they_were_larger() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(12, 16, generator=generator), torch.randn(60, 16, generator=generator)
    wanted, sensitivity = torch.randn(12, 16, generator=generator), torch.rand(12, generator=generator) * 9
    factor = (0.8 * sensitivity + 0.2 * sensitivity.mean()).sqrt()[:, None]
    shared = {"gram": inputs.T @ inputs}
    told = {**shared, "output_cross": wanted, "sensitivity": sensitivity}
    options, pattern = admm.Options(), Unstructured(0.5)
    ours = admm.prune(weight, told, pattern, options, generator)
    larger = admm.prune(weight * factor, {**shared, "output_cross": wanted * factor}, pattern, options, generator)
    assert torch.equal(ours.keep, larger.keep)
    assert torch.allclose(ours.weight, larger.weight / factor, atol=1e-4)
    assert len(set(ours.keep.sum(1).tolist())) > 1


def test_best_spreads_the_sparsity_over_all_linear_layers(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    shared = ["--preset", "best", "--calibration", tokens_file, "-o", "steps=2", "-q", "--json"]
    report = command("prune", llama, tmp_path / "out", *shared).json
    assert report["allocation"]["strategy"] == "sensitivity"
    own = [each for each in report["tensors"] if each["action"] == "pruned"]
    weights = [each["shape"][0] * each["shape"][1] for each in own]
    asked = [each["asked_sparsity"] for each in own]
    assert sum(a * b for a, b in zip(asked, weights, strict=True)) / sum(weights) == pytest.approx(0.5)
    assert 0.3 - 1e-9 <= min(asked) < max(asked) <= 0.7 + 1e-9
    assert len(set(asked)) > len(asked) / 2
    with_pattern = command("prune", llama, tmp_path / "pattern", *shared, "--pattern", "2:4").json
    assert with_pattern["allocation"]["strategy"] == "uniform"


def test_a_block_without_derivatives_is_told_and_gives_evenly(
    llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_cli.unstructured import allocate_by_outputs

    def only_the_first(stream: Any, block: int, *rest: Any) -> Any:
        if block > 0:
            raise RuntimeError("derivative for x is not implemented")
        return output_sensitivity(stream, block, *rest)

    monkeypatch.setattr(allocate_by_outputs, "output_sensitivity", only_the_first)
    arguments = ["-m", "wanda", "--allocate", "sensitivity", "--calibration", tokens_file, "-q", "--json"]
    report = command("prune", llama, tmp_path / "out", *arguments).json
    assert any("Block 1 has no derivative" in warning for warning in report["warnings"])
    table = report["allocation"]["sparsity"]
    assert {value for name, value in table.items() if ".layers.0." not in name} == {0.5}
    assert len({value for name, value in table.items() if ".layers.0." in name}) > 1
