"""SparseGPT and ADMM against slow references in float64."""

from __future__ import annotations

import pytest
import torch

from methods._gram import damped
from methods._pattern import NofM, Pattern, Unstructured
from methods.admm import Options as AdmmOptions
from methods.admm import prune as admm
from methods.sparsegpt import Options as SparseGptOptions
from methods.sparsegpt import prune as sparsegpt
from tests import reference
from tests.test_steps import PATTERNS, make


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("block_size", [4, 8, 32])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_equals_the_column_by_column_reference(pattern: Pattern, block_size: int) -> None:
    """Same mask; and at that mask the same weights, however many columns are worked on at once."""
    weight, x = make(10, 32)
    gram = x.T @ x
    options = SparseGptOptions(block_size=block_size)
    result = sparsegpt(weight, {"gram": gram}, pattern, options, generator())
    size = block_size if isinstance(pattern, Unstructured) else pattern.of
    wanted = pattern.sparsity if isinstance(pattern, Unstructured) else (pattern.keep, pattern.of)
    keep, new = reference.sparsegpt(weight, gram, wanted, size, options.damping)
    assert torch.equal(result.keep, keep)
    torch.testing.assert_close(result.weight.double(), new, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admm_ends_at_the_dense_solve_on_its_mask(pattern: Pattern) -> None:
    """With enough steps on the final mask, the kept weights are the damped least squares on it."""
    weight, x = make(10, 32)
    gram = x.T @ x
    options = AdmmOptions(polish=60)
    result = admm(weight, {"gram": gram}, pattern, options, generator())
    expected = reference.damped_least_squares(weight, result.keep, gram, options.damping)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admm_by_default_is_close_to_that_solve_and_better_than_sparsegpt(pattern: Pattern) -> None:
    weight, x = make(16, 32, seed=3)
    gram = x.T @ x
    result = admm(weight, {"gram": gram}, pattern, AdmmOptions(), generator())
    other = sparsegpt(weight, {"gram": gram}, pattern, SparseGptOptions(), generator())
    exact = reference.damped_least_squares(weight, result.keep, gram, AdmmOptions().damping)
    loss, best, theirs = (
        float((x.double() @ (weight.double() - new.double()).T).square().sum())
        for new in (result.weight, exact, other.weight)
    )
    assert loss < 1.05 * best
    assert loss < theirs


def test_each_row_and_group_gets_the_asked_count() -> None:
    weight, x = make(10, 32)
    statistics = {"gram": x.T @ x}
    by_row = admm(weight, statistics, Unstructured(0.7), AdmmOptions(per="row"), generator())
    assert (~by_row.keep).sum(1).tolist() == [22] * 10
    by_tensor = admm(weight, statistics, Unstructured(0.7), AdmmOptions(), generator())
    assert int((~by_tensor.keep).sum()) == 224
    grouped = admm(weight, statistics, NofM(1, 4), AdmmOptions(), generator())
    assert (grouped.keep.view(10, 8, 4).sum(2) == 1).all()
    whole = sparsegpt(weight, statistics, Unstructured(0.7), SparseGptOptions(block_size=8), generator())
    assert int((~whole.keep).sum()) == 224


def test_damping_is_raised_until_the_matrix_is_definite_and_told() -> None:
    """Fewer tokens than inputs and no damping: the Gram matrix is singular."""
    weight, x = make(6, 32, tokens=5)
    result = sparsegpt(weight, {"gram": x.T @ x}, Unstructured(0.5), SparseGptOptions(damping=1e-9), generator())
    assert result.notes
    assert result.notes[0].startswith("damping raised from 1e-09 to ")
    matrix = torch.diag(torch.tensor([1.0, 1.0, -0.004]))
    _, used = damped(matrix, 0.001, torch.linalg.cholesky)
    assert used == pytest.approx(0.01)
    with pytest.raises(ValueError, match="stays singular"):
        damped(torch.diag(torch.tensor([1.0, -1.0])), 0.01, torch.linalg.cholesky)
