"""Masks of the methods against naive references."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods import load_method, method_names
from methods._pattern import NofM, Pattern, Unstructured, keep_highest
from tests import reference


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def scores(draw: st.DrawFn, columns_multiple_of: int = 1) -> torch.Tensor:
    """Few distinct values, so that ties are everywhere."""
    rows = draw(st.integers(1, 5))
    columns = columns_multiple_of * draw(st.integers(1, 12))
    values = draw(st.lists(st.integers(0, 4), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, columns)


@settings(deadline=None)
@given(scores(), st.floats(0, 0.999))
def test_rows_and_ties_like_the_reference(score: torch.Tensor, sparsity: float) -> None:
    assert torch.equal(keep_highest(score, Unstructured(sparsity)), reference.keep_per_row(score, sparsity))


@settings(deadline=None)
@given(scores(), st.floats(0, 0.999))
def test_whole_tensors_and_ties_like_the_reference(score: torch.Tensor, sparsity: float) -> None:
    pattern = Unstructured(sparsity, per="tensor")
    assert torch.equal(keep_highest(score, pattern), reference.keep_per_tensor(score, sparsity))


@pytest.mark.parametrize("sparsity", [1e-6, 0.3, 0.5, 0.999999])
@pytest.mark.parametrize("kind", ["spread", "tied", "sorted", "seldom"])
def test_large_tensors_like_a_sort(kind: str, sparsity: float) -> None:
    """From some size on a sample says where to look; it must not matter what it says."""
    count = torch.arange(2**18 + 2**17)
    values = {
        "spread": torch.rand(len(count), generator=generator()),
        "tied": (count % 5).float(),
        "sorted": count.float(),
        "seldom": (count % 64 == 63).float() * count,  # most samples are zero
    }[kind]
    keep = keep_highest(values.view(512, -1), Unstructured(sparsity, per="tensor")).flatten()
    order = values.sort(stable=True).indices
    pruned = int(sparsity * len(values) + 1e-9)
    assert not keep[order[:pruned]].any()
    assert keep[order[pruned:]].all()


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (5, 16), (31, 32)])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_n_of_m_and_ties_like_the_reference(keep: int, of: int, data: st.DataObject) -> None:
    score = data.draw(scores(columns_multiple_of=of))
    mask = keep_highest(score, NofM(keep, of))
    assert torch.equal(mask, reference.keep_n_of_m(score, keep, of))
    assert (mask.reshape(-1, of).sum(1) == keep).all()


@pytest.mark.parametrize(
    ("sparsity", "inputs", "pruned"), [(0.7, 10, 7), (0.6, 5, 3), (0.1, 10, 1), (0.5, 7, 3), (0, 9, 0)]
)
def test_counts_are_exact(sparsity: float, inputs: int, pruned: int) -> None:
    mask = keep_highest(torch.rand(3, inputs, generator=generator()), Unstructured(sparsity))
    assert (~mask).sum(1).tolist() == [pruned] * 3


def test_n_of_m_refuses_inputs_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="10 inputs are no multiple of 4"):
        keep_highest(torch.rand(2, 10), NofM(2, 4))


PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.63), NofM(2, 4), NofM(1, 4)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", method_names())
def test_every_method_keeps_its_contract(name: str, pattern: Pattern) -> None:
    method = load_method(name)
    weight = torch.randn(12, 16, generator=generator())
    weight[0, 0] = -0.0
    before = weight.clone()
    inputs = torch.randn(40, 16, generator=generator(1))
    statistics = {key: value for key, value in reference.statistics(inputs).items() if key in method.needs}
    result = method.prune(weight, statistics, pattern, method.options(), generator(2))
    again = method.prune(weight, statistics, pattern, method.options(), generator(2))
    new, keep = result.weight, result.keep
    assert torch.equal(weight, before)
    assert torch.equal(new, again.weight)
    assert new.shape == keep.shape == weight.shape
    assert keep.dtype == torch.bool
    assert (new[~keep] == 0).all()
    assert not torch.signbit(new[~keep]).any()
    assert int((~keep).sum()) in (round(pattern.sparsity * 16 - 0.49) * 12, int(pattern.sparsity * 192))


@pytest.mark.parametrize("name", method_names())
def test_every_method_explains_itself(name: str) -> None:
    method = load_method(name)
    assert method.summary
    assert method.cost
    assert "arXiv" in method.paper or "openreview" in method.paper
    for option in dataclasses.fields(method.options):
        assert option.metadata["help"]


def test_wanda_equals_the_reference() -> None:
    weight = torch.randn(20, 24, generator=generator())
    sq_norm = torch.rand(24, generator=generator(1)) * 100
    method = load_method("wanda")
    keep = method.prune(weight, {"sq_norm": sq_norm}, Unstructured(0.5), method.options(), generator()).keep
    assert torch.equal(keep, reference.keep_per_row(reference.wanda_score(weight, sq_norm), 0.5))


def test_magnitude_selects_in_the_tensor_or_in_rows() -> None:
    weight = torch.randn(20, 24, generator=generator()) * torch.arange(1, 21)[:, None]
    method = load_method("magnitude")
    whole = method.prune(weight, {}, Unstructured(0.5), method.options(), generator()).keep
    rows = method.prune(weight, {}, Unstructured(0.5), method.options(per="row"), generator()).keep
    assert torch.equal(whole, reference.keep_per_tensor(weight.abs(), 0.5))
    assert torch.equal(rows, reference.keep_per_row(weight.abs(), 0.5))
    assert not torch.equal(whole, rows)


def test_random_depends_on_its_generator_alone() -> None:
    method = load_method("random")
    weight = torch.randn(6, 40, generator=generator())
    masks = [method.prune(weight, {}, Unstructured(0.5), method.options(), generator(seed)).keep for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert (masks[0].sum(1) == 20).all()


def test_huge_and_tiny_scales_and_dead_inputs_stay_exact() -> None:
    method = load_method("wanda")
    weight = torch.randn(4, 16, generator=generator())
    for scale in (1e-30, 1e30):
        sq_norm = torch.zeros(16)
        sq_norm[3] = 1.0
        result = method.prune(weight * scale, {"sq_norm": sq_norm}, Unstructured(0.5), method.options(), generator())
        assert torch.isfinite(result.weight).all()
        assert (result.keep.sum(1) == 8).all()
        assert result.keep[:, 3].all()
