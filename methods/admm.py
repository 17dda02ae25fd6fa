"""ADMM: alternates between the best weights and the best mask, both from the Gram matrix (Boža, arXiv:2401.02938)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from methods._allocation import shrunk
from methods._gram import alpha_option, conjugate_gradients, damped, dense_target, raised_damping
from methods._method import Method, Pruned
from methods._pattern import NofM, Pattern, Unstructured, keep_highest, zeroed
from methods._torch import torch

_MOST_SHRINKAGE = 0.3


@dataclass(frozen=True)
class Options:
    steps: int = field(default=10, metadata={"help": "alternations; the sparsity ramps up to the last", "least": 1})
    polish: int = field(default=4, metadata={"help": "steps of conjugate gradients on the final mask", "least": 0})
    rho: float = field(default=1.0, metadata={"help": "weight of the constraint", "least": 1e-6})
    relax: float = field(
        default=1.4,
        metadata={"help": "how far a step goes on in its direction; 1 is no further", "least": 1, "most": 1.9},
    )
    damping: float = field(
        default=0.03,
        metadata={"help": "the least to add to the Gram matrix scaled to a unit diagonal", "least": 0},
    )
    shrinkage: float = field(
        default=1.5,
        metadata={"help": "the fewer tokens, the more damping: this times inputs / tokens, up to 0.3", "least": 0},
    )
    per: Literal["tensor", "row"] = field(
        default="tensor", metadata={"help": "weights compete within the whole tensor or within a row"}
    )
    alpha: float = alpha_option()


def prune(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    options: Options,
    generator: torch.Generator,
) -> Pruned:
    """Minimise ||X W^T - X' W_new^T|| over sparse W_new (out, in); `gram` is (in, in).

    For dense targets there is also `cross` (in, in) or, for a layer that adds to the residual stream, `output_cross`
    (out, in). With `sensitivity` (out,), squared derivatives by the outputs, rows compete by what their errors matter.
    Columns are scaled by d = sqrt(diag G), so that the scaled Gram matrix has a unit diagonal. Raises ValueError
    where it cannot be made positive definite. `relax` is the over-relaxation of Boyd et al. (2011), section 3.4.3.
    """
    if isinstance(pattern, Unstructured):
        pattern = replace(pattern, per=options.per)
    importance = shrunk(statistics["sensitivity"]).sqrt()[:, None] if "sensitivity" in statistics else 1.0
    scale = statistics["gram"].diagonal().sqrt()
    dead = scale == 0
    scale = scale.masked_fill(dead, 1.0)
    gram = _scaled(statistics["gram"], scale)
    start = weight.masked_fill(dead, 0.0) * scale
    least = _damping(statistics, options)
    target = dense_target(weight, statistics, options.alpha).div_(scale).add_(start, alpha=least)
    gram.diagonal()[dead] = 1.0
    inverse, used = damped(gram, least + options.rho, _inverse)
    current, dual = start, torch.zeros_like(start)
    sparse, keep = start, torch.ones_like(start, dtype=torch.bool)
    for step in range(1, options.steps + 1):
        candidate = sparse.lerp(current, options.relax).add_(dual)
        keep = keep_highest(candidate.abs() * importance, _ramped(pattern, step / options.steps))
        sparse = zeroed(candidate, keep)
        dual = candidate - sparse
        # sparse - dual is 2 sparse - wish
        current = target.add(candidate.lerp(sparse, 2.0), alpha=options.rho) @ inverse
    new = conjugate_gradients(_damp(gram, least), target, zeroed(current + dual, keep), keep, options.polish)
    return Pruned(zeroed(new / scale, keep), keep, raised_damping(least + options.rho, used))


def _damping(statistics: Mapping[str, torch.Tensor], options: Options) -> float:
    """What pulls towards the original weights as hard as the tokens are few; `tokens` () is how many there were.

    A ridge of c x inputs / tokens on a unit diagonal is a prior of c x inputs pseudo-tokens; held-out errors on
    SmolLM2 are lowest around c = 1.5 (docs/quality.md).
    """
    if "tokens" not in statistics:
        return options.damping
    few = options.shrinkage * len(statistics["gram"]) / max(float(statistics["tokens"]), 1.0)
    return max(options.damping, min(few, _MOST_SHRINKAGE))


def _scaled(matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return matrix / scale / scale[:, None]


def _damp(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    matrix = matrix.clone()
    matrix.diagonal().add_(damping)
    return matrix


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _ramped(pattern: Pattern, progress: float) -> Pattern:
    """The sparsity on its way up, cubically; an N:M mask is whole from the first step."""
    if isinstance(pattern, NofM):
        return pattern
    assert isinstance(pattern, Unstructured)
    return replace(pattern, sparsity=pattern.sparsity * (1 - (1 - progress) ** 3))


METHOD = Method(
    summary="solves for the mask and the kept weights together by ADMM on the inputs' Gram matrix; the strongest",
    paper="Boža, Fast and Effective Weight Update for Pruned Large Language Models, arXiv:2401.02938",
    cost="one forward pass, a Gram matrix and an inverse per distinct input, 16 products (out, in) x (in, in)",
    needs=("gram",),
    prune=prune,
    options=Options,
    solves=True,
    counts_rows=False,
)
