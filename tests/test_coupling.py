"""Which tensors shrink together is found in every architecture, and proven by taking units out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prune_cli.engine.open_model import OpenModel, open_model
from prune_cli.errors import RequestError
from prune_cli.request.request import PruneRequest
from prune_cli.structured.units import GroupName, UnitLayout
from prune_cli.structured.width.coupling import find_group, unit_count
from prune_cli.structured.width.verify_coupling import verified_group
from tests.tiny import save_tiny

# Tensors of the first narrowed block that carry units, by the ends of their names.
_LLAMA_MLP = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
_LLAMA_HEADS = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
_FC = {"fc1.weight", "fc1.bias", "fc2.weight"}
_NEOX = {"dense_h_to_4h.weight", "dense_h_to_4h.bias", "dense_4h_to_h.weight"}
# test_width.py narrows the common architectures end to end and compares what they compute; these are the others.
MLP: dict[str, set[str]] = {
    **dict.fromkeys(("llama-tied", "cohere", "stablelm", "olmo2", "qwen3_moe", "deepseek_v3"), _LLAMA_MLP),
    "phi3": {"gate_up_proj.weight", "down_proj.weight"},
    "opt-projected": _FC,
    "gpt2": {"c_fc.weight", "c_fc.bias", "c_proj.weight"},
    "gptj": {"fc_in.weight", "fc_in.bias", "fc_out.weight"},
    "falcon-alibi": _NEOX,
    **dict.fromkeys(("falcon-new", "falcon-old"), _NEOX - {"dense_h_to_4h.bias"}),
}
HEADS: dict[str, set[str]] = {
    "deepseek_v3": {"q_b_proj.weight", "kv_b_proj.weight", "o_proj.weight"},
    **dict.fromkeys(("llama-tied", "cohere", "mixtral", "qwen3_moe"), _LLAMA_HEADS),
    "phi3": {"qkv_proj.weight", "o_proj.weight"},
}
REFUSED: dict[tuple[str, GroupName], str] = {
    ("bloom", "mlp"): "no key for the MLP's width",
    ("mpt", "mlp"): "no key for the MLP's width",
    ("mamba", "mlp"): "A_log would shrink",
    ("mixtral", "mlp"): "another layout",
    ("olmo2", "heads"): "changes what the others compute",
    ("mamba", "heads"): "no number of attention heads",
    ("gpt_oss", "mlp"): "expert",
    ("gpt_oss", "heads"): "sinks would shrink",
    **dict.fromkeys((("falcon-new", "heads"), ("falcon-old", "heads")), "no whole number of rows for each"),
}


def opened(folder: Path) -> OpenModel:
    return open_model(PruneRequest(model=str(folder), out=folder.parent / "out"))


@pytest.mark.parametrize("kind", sorted({*MLP, *HEADS, *(kind for kind, _ in REFUSED)}))
def test_the_tensors_that_carry_units_are_found_and_proven(kind: str, tmp_path: Path) -> None:
    model = opened(save_tiny(tmp_path / "model", kind, shards=False, tokenizer=False))
    parts: tuple[tuple[GroupName, dict[str, set[str]]], ...] = (("mlp", MLP), ("heads", HEADS))
    for part, expected in parts:
        if kind in expected:
            found = verified_group(model, part, unit_count(model, part) // 2)
            block = min(found.consumers)
            names = {name for name in found.slices if found.blocks[name] == block}
            assert {".".join(name.split(".")[-2:]) for name in names} == expected[kind]
            assert found.consumers[block] in found.slices
        else:
            with pytest.raises(RequestError, match=REFUSED.get((kind, part), "no head_dim of their own")):
                verified_group(model, part, unit_count(model, part) // 2)


def test_a_fused_map_is_cut_in_the_layout_that_the_proof_passes(tmp_path: Path) -> None:
    model = opened(save_tiny(tmp_path / "model", "phi3", shards=False, tokenizer=False))
    heads = verified_group(model, "heads", 1)
    fused = next(name for name in heads.slices if "qkv_proj" in name)
    assert heads.slices[fused].sections == (16, 8, 8)
    others = [part.slices[fused].sections for part in find_group(model, "heads", 1)]
    assert others == [(16, 8, 8), (32,)]


def test_rows_of_units() -> None:
    kept = torch.tensor([0, 2])
    assert UnitLayout(0, (2, 1), tail=2).rows(kept, 3).tolist() == [0, 1, 4, 5, 6, 8, 9, 10]
    assert UnitLayout(1, (1,)).apply(torch.arange(6).view(2, 3), kept, 3).tolist() == [[0, 2], [3, 5]]
