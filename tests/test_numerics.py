"""Inputs at the edge of what numbers allow: no NaN, no crash, exact counts; or one clear ValueError."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from methods import load_method, method_names
from methods._method import Pruned
from methods._pattern import NofM, Pattern, Unstructured
from methods.steps import load_step, step_names
from tests import reference
from tests.conftest import RunCommand

PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.9), NofM(2, 4)]


def inputs(kind: str, tokens: int, width: int) -> torch.Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    if kind == "dead":
        x[:, ::3] = 0
    elif kind == "all dead":
        x.zero_()
    elif kind == "constant":
        x = x[:1].expand(tokens, width).clone()
    elif kind == "one token":
        x = x[:1]
    elif kind == "repeated":
        x = x[:, :1].expand(tokens, width).clone()
    elif kind == "massive":
        x[:, 0] *= 3e4
    elif kind == "huge":
        x *= 1e12
    elif kind == "tiny":
        x *= 1e-12
    elif kind == "bfloat16":
        x = x.bfloat16().float()
    return x


KINDS = ["plain", "dead", "all dead", "constant", "one token", "repeated", "massive", "huge", "tiny", "bfloat16"]


def statistics(x: torch.Tensor, *, dense: str = "", outputs: int = 6) -> dict[str, torch.Tensor]:
    """`dense` is what tells of the dense model, if anything does: cross or output_cross."""
    found = reference.statistics(x)
    generator = torch.Generator().manual_seed(2)
    if dense == "cross":
        noisy = x + 0.1 * x.std() * torch.randn(x.shape, generator=generator)
        found[dense] = noisy.T @ x
    elif dense == "output_cross":
        found[dense] = torch.randn(outputs, len(x), generator=generator) @ x
    return found


def odd_case(kind: str, *, dense: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight (6, 24) as a bfloat16 checkpoint has it, and what is known of its inputs."""
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    return weight, statistics(inputs(kind, 10, 24), dense=dense)


def assert_sound(result: Pruned, pattern: Pattern, *, by_row: bool) -> None:
    assert bool(torch.isfinite(result.weight).all())
    assert not result.weight[~result.keep].any()
    rows, width = result.keep.shape
    if isinstance(pattern, NofM):
        assert (result.keep.view(rows, -1, pattern.of).sum(2) == pattern.keep).all()
    elif by_row:
        assert (~result.keep).sum(1).tolist() == [int(pattern.sparsity * width + 1e-9)] * rows
    else:
        assert int((~result.keep).sum()) == int(pattern.sparsity * rows * width + 1e-9)


@pytest.mark.parametrize("dense", ["", "cross", "output_cross"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", method_names())
def test_every_method_on_odd_inputs(name: str, kind: str, dense: str) -> None:
    method = load_method(name)
    weight, known = odd_case(kind, dense=dense)
    for pattern in PATTERNS:
        result = method.prune(weight, known, pattern, method.options(), torch.Generator().manual_seed(0))
        assert_sound(result, pattern, by_row=method.counts_rows)


@pytest.mark.parametrize("dense", ["", "cross", "output_cross"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", step_names())
def test_every_step_on_odd_inputs(name: str, kind: str, dense: str) -> None:
    step = load_step(name)
    weight, known = odd_case(kind, dense=dense)
    wanda = load_method("wanda")
    for pattern in PATTERNS:
        start = wanda.prune(weight, known, pattern, wanda.options(), torch.Generator())
        assert_sound(step.improve(weight, start, known, pattern, step.options()), pattern, by_row=True)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 3),
    width=st.integers(1, 9),
    sparsity=st.floats(0, 0.999),
    weights=st.sampled_from([0.0, 1e-9, 1.0, 1e9]),
    scale=st.sampled_from([1e-15, 1e-6, 1.0, 1e6]),
    tokens=st.integers(1, 12),
)
@pytest.mark.parametrize("name", [*method_names(), *(f"+{step}" for step in step_names())])
def test_small_shapes_and_scales(
    name: str, rows: int, width: int, sparsity: float, weights: float, scale: float, tokens: int
) -> None:
    """One row, one input, all zeros, large and small; what lies further out is scaled before a method sees it."""
    weight = weights * torch.randn(rows, width, generator=torch.Generator().manual_seed(3))
    known = statistics(scale * inputs("plain", tokens, width))
    pattern = Unstructured(sparsity)
    method = load_method("wanda" if name.startswith("+") else name)
    result = method.prune(weight, known, pattern, method.options(), torch.Generator().manual_seed(0))
    if name.startswith("+"):
        step = load_step(name[1:])
        result = step.improve(weight, result, known, pattern, step.options())
    assert_sound(result, pattern, by_row=method.counts_rows)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_weights_below_the_normal_range_stay_finite(
    method: str, whole: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    model, name = tmp_path / "denormal", "model.layers.1.self_attn.v_proj.weight"
    shutil.copytree(whole, model)
    tensors = load_file(model / "model.safetensors")
    tensors[name] = tensors[name] * 2.0**-135
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    outcome = command("prune", model, tmp_path / "out", "-m", method, "--calibration", tokens_file, "-q")
    assert outcome.code == 0, outcome.stderr
    before, after = tensors[name], load_file(tmp_path / "out" / "model.safetensors")[name]
    kept = after != 0
    assert torch.equal(after[kept], before[kept])
    assert int(kept.sum()) == kept.numel() // 2


@pytest.mark.parametrize("arguments", [["--method", "wanda"], ["--method", "admm", "--target", "dense"]])
@pytest.mark.parametrize("power", [2.0**50, 2.0**-50])
def test_weights_far_out_give_the_masks_of_ordinary_ones(
    power: float, arguments: list[str], whole: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    """v_proj times 2**50 and o_proj over it compute the same model, in float32 exactly."""
    far = tmp_path / "far"
    shutil.copytree(whole, far)
    tensors = load_file(whole / "model.safetensors")
    for name in tensors:
        tensors[name] = tensors[name] * {"v_pro": power, "o_pro": 1 / power}.get(name.split(".")[-2][:5], 1.0)
    save_file(tensors, far / "model.safetensors", metadata={"format": "pt"})
    arguments = [*arguments, "--calibration", str(tokens_file), "-q"]
    assert command("prune", whole, tmp_path / "a", *arguments).code == 0
    outcome = command("prune", far, tmp_path / "b", *arguments)
    assert outcome.code == 0, outcome.stderr
    ordinary, odd = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    for name, tensor in odd.items():
        assert bool(torch.isfinite(tensor).all())
        assert float(((tensor == 0) == (ordinary[name] == 0)).float().mean()) > 0.99
    report = json.loads((tmp_path / "b" / "prune_report.json").read_text())
    assert all(0 < t["output_error"] < 1 for t in report["tensors"] if t["action"] == "pruned")
