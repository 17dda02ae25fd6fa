"""Puts extra heads into tiny checkpoints, as published ones have them beside the model that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny

SHARD = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def add(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Store `tensors` with those of a model in one file."""
    save_file({**load_file(folder / SHARD), **tensors}, folder / SHARD, metadata={"format": "pt"})
    return folder


def like_block(folder: Path, block: int, head: str, seed: int = 7) -> Tensors:
    """A head's own block: shaped like `block` of the model, with other values."""
    start, generator = f"model.layers.{block}.", torch.Generator().manual_seed(seed)
    return {
        head + name.removeprefix(start): tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(folder / SHARD).items()
        if name.startswith(start)
    }


def save_deepseek(folder: Path) -> Path:
    """Three blocks, and behind them one for multi-token prediction, which only its number tells from the others."""
    save_tiny(folder, "deepseek_v3", shards=False)
    joins = {"eh_proj.weight": torch.randn(32, 64), "enorm.weight": torch.rand(32), "hnorm.weight": torch.rand(32)}
    joins["shared_head.norm.weight"] = torch.rand(32)
    named = {f"model.layers.3.{name}": tensor for name, tensor in joins.items()}
    return add(folder, {**like_block(folder, 2, "model.layers.3."), **named})


def save_qwen(folder: Path) -> Path:
    """A head whose names have a root of their own, and a full-attention block with experts in it."""
    save_tiny(folder, "qwen3_next", shards=False, num_hidden_layers=4)
    joins = {"fc.weight": torch.randn(32, 64), "norm.weight": torch.rand(32)}
    joins |= {"pre_fc_norm_embedding.weight": torch.rand(32), "pre_fc_norm_hidden.weight": torch.rand(32)}
    named = {f"mtp.{name}": tensor for name, tensor in joins.items()}
    return add(folder, {**like_block(folder, 3, "mtp.layers.0."), **named})
