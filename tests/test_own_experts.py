"""Experts that transformers computes in ways of their own: DBRX, JetMoE, LongCat; pruned, and removed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from tests import reference
from tests.conftest import RunCommand, token_ids
from tests.packed_files import change
from tests.test_expert_removal import _NeverPicked, removed_experts
from tests.test_experts import tensors_of
from tests.tiny import load_plain, save_tiny

KINDS = ("dbrx", "jetmoe", "longcat_flash")
Tensors = dict[str, torch.Tensor]
EXPERTS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("own")
    return {kind: save_tiny(root / kind, kind) for kind in KINDS}


def dbrx(tensors: Tensors, block: int, expert: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    rows = slice(24 * expert, 24 * (expert + 1))
    w1, v1, w2 = (tensors[f"transformer.blocks.{block}.ffn.experts.mlp.{name}"][rows] for name in ("w1", "v1", "w2"))
    return [w1, v1], w2.T


def jetmoe(tensors: Tensors, block: int, expert: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    first, last = (tensors[f"model.layers.{block}.mlp.{name}_linear.weight"][expert] for name in ("input", "output"))
    return [first], last


def longcat_flash(tensors: Tensors, block: int, expert: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    names = [f"model.layers.{block}.mlp.experts.{expert}.{name}_proj.weight" for name in ("gate", "up", "down")]
    gate, up, down = (tensors[name] for name in names)
    return [gate, up], down


MATRICES: dict[str, Callable[[Tensors, int, int], tuple[list[torch.Tensor], torch.Tensor]]] = {
    "dbrx": dbrx,
    "jetmoe": jetmoe,
    "longcat_flash": longcat_flash,
}


@torch.no_grad()
def at_experts(kind: str, model: Any, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (tokens, in) and the experts (tokens, k) that they are sent to, from one forward of the model."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    if kind == "jetmoe":
        module = model.model.layers[block].mlp.router
        hook = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out[4].topk(2).indices)))
    else:
        where = model.transformer.blocks[block].ffn if kind == "dbrx" else model.model.layers[block].mlp
        hook = where.experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    model(input_ids=token_ids(), use_cache=False)
    hook.remove()
    ((hidden, chosen),) = seen
    return hidden.reshape(-1, hidden.shape[-1]), chosen


def mask(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return reference.keep_per_row(reference.wanda_score(weight, rows.double().pow(2).sum(0).float()), 0.5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_masks_are_those_of_their_tokens(
    kind: str, models: dict[str, Path], tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    arguments = ["--calibration", tokens_file, "--eval", tokens_file, "--batch-size", 6, "--json"]
    run = command("prune", models[kind], tmp_path / "out", *arguments)
    assert run.code == 0, run.stderr
    model, dense, pruned = load_plain(tmp_path / "out"), tensors_of(models[kind]), tensors_of(tmp_path / "out")
    for block in (0, 1):
        hidden, chosen = at_experts(kind, model, block)
        for expert in range(EXPERTS):
            rows = hidden[(chosen == expert).any(-1)]
            rows = rows if len(rows) >= 32 else hidden
            (first, last), (new, new_last) = (MATRICES[kind](each, block, expert) for each in (dense, pruned))
            for before, after in zip(first, new, strict=True):
                assert torch.equal(after, before * mask(before, rows))
            gate, up = torch.cat([rows @ weight.T for weight in new], dim=-1).chunk(2, dim=-1)
            assert torch.equal(new_last, last * mask(last, silu(gate) * up))
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in token_ids()]
    found = run.json["evaluation"]["after"]["perplexity"]
    assert found == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-4)
    kept = {t["name"]: t["reason"] for t in run.json["tensors"] if t["action"] == "kept"}
    if kind == "jetmoe":
        assert kept["model.layers.0.self_attention.experts.input_linear.weight"] == "experts of attention are kept"
    if kind == "longcat_flash":
        assert "reads no weights" in kept["model.layers.0.mlp.experts.5.gate_proj.weight"]


@pytest.mark.parametrize("kind", ["dbrx", "longcat_flash"])
@torch.no_grad()
def test_an_output_is_the_dense_model_that_never_picks_them(
    kind: str, models: dict[str, Path], tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    run = command("prune", models[kind], tmp_path / "out", "-m", "experts", "-s", 0.25, "--calibration", tokens_file)
    assert run.code == 0, run.stderr
    removed = removed_experts(json.loads((tmp_path / "out" / "prune_report.json").read_text()))
    assert all(len(each) == 1 for each in removed.values())
    smaller: Any = load_plain(tmp_path / "out")
    model: Any = load_plain(models[kind])
    routers = {}
    for block, experts in removed.items():
        if kind == "dbrx":
            routers[id(model.transformer.blocks[block].ffn.router.layer.weight)] = experts
        else:
            router = model.model.layers[block].mlp.router
            routers[id(router.classifier.weight)] = experts
            router.e_score_correction_bias[experts] = -1e9
    ids = token_ids()
    whole = model(input_ids=ids, use_cache=False).logits
    with _NeverPicked(routers):
        wanted = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(smaller(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5)
    assert float((whole - wanted).abs().max()) > 1e-3
    if kind == "longcat_flash":
        assert smaller.config.zero_expert_num == 2
        assert smaller.model.layers[0].mlp.router.classifier.weight.shape[0] == 3 + 2


def test_experts_of_attention_stay(
    models: dict[str, Path], tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    run = command("prune", models["jetmoe"], tmp_path / "out", "-m", "experts", "--calibration", tokens_file)
    assert run.code == 2
    assert "config.json counts them together with the experts of attention" in " ".join(run.stderr.split())


@pytest.mark.parametrize("method", ["wanda", "experts"])
def test_what_is_published_has_nothing_for_experts_without_weights(
    method: str, models: dict[str, Path], tokens_file: Path, tmp_path: Path, command: RunCommand
) -> None:
    """LongCat's own files lack what transformers saves for them and never reads; the rest becomes the same."""
    published = tmp_path / "published"
    shutil.copytree(models["longcat_flash"], published)
    whole = tensors_of(published)
    change(published, {name: None for name in whole if ".experts.4." in name or ".experts.5." in name})
    arguments = ["-m", method, "-s", 0.25, "--calibration", tokens_file, "--eval", tokens_file, "--json"]
    runs = [
        command("prune", model, tmp_path / "out" / model.name, *arguments)
        for model in (models["longcat_flash"], published)
    ]
    assert [run.code for run in runs] == [0, 0], runs[1].stderr
    first, second = (run.json["evaluation"]["after"]["perplexity"] for run in runs)
    assert first == second
    full, lean = tensors_of(tmp_path / "out" / "longcat_flash"), tensors_of(tmp_path / "out" / "published")
    assert all(torch.equal(full[name], tensor) for name, tensor in lean.items())
    beyond = range(3, 5) if method == "experts" else range(4, 6)
    gone = {name for name in full if any(f".experts.{expert}." in name for expert in beyond)}
    assert full.keys() - lean.keys() == gone != set()
