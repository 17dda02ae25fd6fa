"""The sums behind depth scores and expert scores: of two parts of the batches, merged, they are those of all."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from calibration.batch import Batch
from prune_cli.engine.open_model import OpenModel, open_model
from prune_cli.progress import Silent
from prune_cli.request.request import PruneRequest
from prune_cli.structured.hidden_states import StateSums, gather_states, measure_states
from prune_cli.structured.moe.expert_statistics import ExpertSums, gather_experts, measure_experts
from prune_cli.structured.moe.mixtures import find_mixtures
from tests.conftest import token_ids
from tests.tiny import save_tiny

Sums = TypeVar("Sums", StateSums, ExpertSums)


def opened(folder: Path) -> OpenModel:
    return open_model(PruneRequest(model=str(folder), out=folder.parent / "out"))


def batches() -> list[Batch]:
    """Of one and of several samples, one of them padded."""
    ids = token_ids()[:6]
    mask = torch.ones_like(ids[3:5], dtype=torch.bool)
    mask[1, 5:] = False
    return [Batch(ids[:2]), Batch(ids[2:3]), Batch(ids[3:5], mask), Batch(ids[5:])]


def merged(empty: Sums, parts: Sequence[Sums]) -> Sums:
    for part in parts:
        empty.merge(pickle.loads(pickle.dumps(part)))
    return empty


@torch.no_grad()
@pytest.mark.parametrize("at", [1, 3])
def test_states_of_two_parts_are_those_of_the_whole(at: int, tmp_path: Path) -> None:
    job = opened(save_tiny(tmp_path / "model", "llama-tied", shards=False, tokenizer=False))
    tokens = sum(batch.tokens for batch in batches())
    parts = [gather_states(job, part, tokens, Silent()) for part in (batches()[:at], batches()[at:])]
    found = merged(StateSums.of(len(job.model.blocks)), parts)
    influence, distances = measure_states(job, batches(), Silent())
    assert found.tokens == tokens
    assert influence.min() > 0
    torch.testing.assert_close(found.influence(), influence, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.distances(), distances, rtol=1e-12, atol=0)


@torch.no_grad()
def test_experts_of_two_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    job = opened(save_tiny(tmp_path / "model", "mixtral", shards=False, tokenizer=False))
    mixtures = find_mixtures(job.model)
    parts = [gather_experts(job, mixtures, part, Silent()) for part in (batches()[:1], batches()[1:])]
    whole = measure_experts(job, mixtures, batches(), Silent())
    for mixture in mixtures:
        found = merged(ExpertSums.of(mixture.experts), [part[mixture.block] for part in parts])
        expected = {name: torch.tensor(values, dtype=torch.float64) for name, values in whole[mixture.block].items()}
        assert found.by_name.keys() == expected.keys()
        for name, values in found.by_name.items():
            assert values.any()
            torch.testing.assert_close(values, expected[name], rtol=1e-12, atol=0)
