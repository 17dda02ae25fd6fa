"""Folders as other tools leave them: indices, names and adapters that the model itself can do without, or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.broken import INDEX, SHARD, copy_of, refused
from tests.conftest import RunCommand
from tests.tiny import load_plain

Weights = dict[str, torch.Tensor]


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}])
def test_an_index_without_metadata(metadata: dict[str, None], llama: Path, tmp_path: Path, command: RunCommand) -> None:
    """transformers reads no such index, so an output's has them, whatever writes it."""
    model = copy_of(llama, tmp_path / "model")
    index = json.loads((model / INDEX).read_text())
    (model / INDEX).write_text(json.dumps({"weight_map": index["weight_map"], **metadata}))
    assert command("prune", model, tmp_path / "out", "-m", "magnitude", "-q").code == 0
    assert command("convert", model, tmp_path / "sparse", "--format", "sparse", "--force", "-q").code == 0
    load_plain(tmp_path / "out")
    for out in ("out", "sparse"):
        written = json.loads((tmp_path / out / INDEX).read_text())
        assert written["metadata"]["total_size"] == index["metadata"]["total_size"]
        assert written["weight_map"] == index["weight_map"]


def test_an_index_that_names_a_tensor_which_nobody_needs(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(llama, tmp_path / "model")
    index = json.loads((model / INDEX).read_text())
    shard = index["weight_map"]["lm_head.weight"]
    (model / INDEX).write_text(json.dumps(index | {"weight_map": {**index["weight_map"], "mtp.fc.weight": shard}}))
    outcome = command("prune", model, tmp_path / "out", "-m", "magnitude")
    assert outcome.code == 0, outcome.stderr
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"] == index["weight_map"]
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert any("mtp.fc.weight" in warning and "no file holds" in warning for warning in report["warnings"])
    assert command("inspect", model, "--json").json["absent"] == {"mtp.fc.weight": shard}


def test_an_adapter_beside_a_model(whole: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(whole, tmp_path / "model")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, model / "adapter_model.safetensors")
    outcome = command("prune", model, tmp_path / "out", "-m", "magnitude")
    assert outcome.code == 0
    assert "Warning: adapter_config.json was not copied: the adapter" in outcome.stdout + outcome.stderr
    assert not list((tmp_path / "out").glob("adapter*"))
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert any("adapter_config.json was not copied: the adapter" in warning for warning in report["warnings"])


def _prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def _lora(weights: Weights) -> Weights:
    return {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in weights.items()}


IN_THE_WAY: Mapping[str, tuple[Callable[[Weights], Weights], str]] = {
    "compiled": (_prefixed("_orig_mod."), "_orig_mod. in the names is of a wrapper (torch.compile)"),
    "distributed": (_prefixed("module."), "module. in the names is of a wrapper (DistributedDataParallel)"),
    "in an own class": (_prefixed("llm."), "the names begin with llm. there, as in llm.model.embed_tokens.weight"),
    "checkpointed blocks": (
        lambda weights: {n.replace(".mlp.", "._checkpoint_wrapped_module.mlp."): t for n, t in weights.items()},
        "_checkpoint_wrapped_module. in the names is of a wrapper (activation checkpointing)",
    ),
    "LoRA": (_lora, "LoRA layers were never merged (as model.layers.0.self_attn.q_proj.base_layer.weight)"),
    "LoRA beside the weights": (
        lambda weights: weights | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)},
        "LoRA layers were never merged (as model.layers.0.self_attn.q_proj.lora_A.default.weight)",
    ),
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_is_in_the_way_is_named(kind: str, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    change, words = IN_THE_WAY[kind]
    model = copy_of(whole, tmp_path / "model")
    save_file(change(load_file(model / SHARD)), model / SHARD, metadata={"format": "pt"})
    assert words in refused(command, model, tmp_path / "out")
