"""Tables whose values are experts (the hash routers of DeepSeek-V4): they follow the experts that stay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM

from methods.structured._expert_tables import without_removed
from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.errors import RequestError
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.structured.block_tables import check_no_block_tables
from prune_cli.structured.moe.tables import expert_tables
from tests.broken import SHARD, copy_of, refused
from tests.conftest import RunCommand, token_ids
from tests.tiny import load_plain

EXPERTS, KEEP, VOCABULARY = 6, 4, 128
_V4: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16,
    "num_experts_per_tok": 2, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "max_position_embeddings": 64,
    "sliding_window": 16, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    "hc_mult": 2, "num_nextn_predict_layers": 0, "mlp_layer_types": ["hash_moe", "hash_moe"],
}  # fmt: skip


def naive(table: Sequence[Sequence[int]], kept: Sequence[int], router: torch.Tensor) -> list[list[int]]:
    """Row by row and entry by entry, by the experts' old numbers."""
    rows = []
    for row in table:
        new: list[int | None] = [expert if expert in kept else None for expert in row]
        for place, expert in enumerate(row):
            if expert not in kept:
                free = [other for other in kept if other not in new]
                angles = [float(cosine_similarity(router[expert], router[other], dim=0)) for other in free]
                new[place] = free[angles.index(max(angles))]
        rows.append([int(expert) for expert in new if expert is not None])
    return rows


@st.composite
def _cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    experts = draw(st.integers(2, 8))
    kept = sorted(draw(st.sets(st.integers(0, experts - 1), min_size=1, max_size=experts)))
    width = draw(st.integers(1, len(kept)))
    numbers = st.lists(st.integers(0, experts - 1), min_size=width, max_size=width, unique=True)
    table = torch.tensor(draw(st.lists(numbers, min_size=1, max_size=5)))
    router = torch.randn(experts, 3, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).double()
    return table, kept, router


@settings(deadline=None, max_examples=50)
@given(_cases())
def test_the_table_is_the_naive_one(case: tuple[torch.Tensor, list[int], torch.Tensor]) -> None:
    table, kept, router = case
    found = without_removed(table, torch.tensor(kept), router)
    assert [[kept[expert] for expert in row] for row in found.tolist()] == naive(table.tolist(), kept, router)
    assert found.dtype == table.dtype


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("tables") / "model", torch.Generator().manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v4", **_V4)).save_pretrained(folder)
    tensors = load_file(folder / SHARD)
    for name, tensor in tensors.items():
        if name.endswith("tid2eid"):
            draws = torch.rand(VOCABULARY, EXPERTS, generator=generator)
            tensors[name] = draws.argsort(1)[:, : tensor.shape[1]].contiguous()
        elif tensor.is_floating_point() and tensor.ndim > 1:
            tensors[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    return folder


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_an_output_is_the_dense_model_that_sends_tokens_elsewhere(
    model: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    arguments = ("-m", "experts", "-o", f"keep={KEEP}", "--calibration", tokens_file)
    outcome = command("prune", model, tmp_path / "out", *arguments)
    assert outcome.code == 0, outcome.stderr
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    dense = load_plain(model)
    for block in report["structure"]["blocks"]:
        removed = {int(number) for number in block["removed"].removeprefix("experts ").split(", ")}
        kept = [expert for expert in range(EXPERTS) if expert not in removed]
        gate: Any = dense.model.layers[block["block"]].mlp.gate
        gate.tid2eid.copy_(torch.tensor(naive(gate.tid2eid.tolist(), kept, gate.weight)))
    logits = load_plain(tmp_path / "out")(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(logits, dense(input_ids=token_ids(), use_cache=False).logits, rtol=1e-4, atol=1e-5)
    changed = [each for each in report["tensors"] if each["reason"] == "names experts by their new numbers"]
    assert len(changed) == 2


def test_a_table_that_names_no_expert_is_refused(model: Path, tmp_path: Path, command: RunCommand) -> None:
    damaged = copy_of(model, tmp_path / "model")
    tensors = load_file(damaged / SHARD)
    name = next(name for name in tensors if name.endswith("tid2eid"))
    tensors[name][7, 1] = EXPERTS
    save_file(tensors, damaged / SHARD, metadata={"format": "pt"})
    words = refused(command, damaged, tmp_path / "out", "-m", "experts", "-o", "score=random")
    assert f"{name} sends a token to expert {EXPERTS}, expected 0 to {EXPERTS - 1}" in words


def _model_with(values: torch.Tensor, block: int | None) -> Any:
    """What the checks look at, of a model of three blocks with one whole-number tensor."""
    entry = TensorEntry("table", SHARD, "I64", tuple(values.shape), 0, values.nbytes)
    info = TensorInfo(entry, "other", block, "model.table", False, "")
    return SimpleNamespace(
        blocks=[None] * 3, tensor_map={"table": info}, checkpoint=SimpleNamespace(read=lambda _: values)
    )


def test_whole_numbers_that_may_be_experts_or_blocks_are_refused() -> None:
    small, positions, large = torch.tensor([0, 2, 1]), torch.arange(3), torch.tensor([0, 2, 100])
    with pytest.raises(RequestError, match="table holds whole numbers below 6, which may be those of experts"):
        expert_tables(_model_with(small, 1), (), {1: [0, 1]}, 6)
    assert expert_tables(_model_with(large, 1), (), {1: [0, 1]}, 6) == {}
    with pytest.raises(RequestError, match="table holds whole numbers below 3, which may be those of blocks"):
        check_no_block_tables(_model_with(small, None))
    check_no_block_tables(_model_with(positions, None))
    check_no_block_tables(_model_with(large, None))
