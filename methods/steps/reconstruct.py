"""Least squares for the kept weights of any mask, by conjugate gradients on all rows at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from methods._gram import alpha_option, conjugate_gradients, dense_target
from methods._method import Pruned, Step
from methods._pattern import Pattern, zeroed
from methods._torch import torch


@dataclass(frozen=True)
class Options:
    steps: int = field(default=20, metadata={"help": "steps of conjugate gradients", "least": 1})
    damping: float = field(
        default=0.01, metadata={"help": "pull towards the dense weights, as a share of each input's square", "least": 0}
    )
    alpha: float = alpha_option()


def improve(
    weight: torch.Tensor,
    pruned: Pruned,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    options: Options,
) -> Pruned:
    """Minimise ||X W^T - X' W_new^T||^2 + damping ||(W_new - W) D||^2 over the kept weights, row by row.

    D^2 = diag(G), which makes the system's diagonal one in the scale that it is solved in; the method's weights are
    the start. `gram` is (in, in), for dense targets `cross` too, or `output_cross` (out, in). Dead inputs keep theirs.
    """
    gram, keep = statistics["gram"], pruned.keep
    scale = gram.diagonal().sqrt()
    scale = scale.masked_fill(scale == 0, 1.0)
    scaled = gram / scale / scale[:, None]
    target = dense_target(weight, statistics, options.alpha) / scale + options.damping * weight * scale
    scaled.diagonal().add_(options.damping)
    solution = conjugate_gradients(scaled, target, pruned.weight * scale, keep, options.steps)
    return Pruned(zeroed(solution / scale, keep), keep, pruned.notes)


STEP = Step(
    changes="weights",
    summary="fits the kept weights of any mask by least squares to the outputs",
    paper="the masked least squares that SparseGPT's appendix calls exact reconstruction, arXiv:2301.00774",
    cost="a Gram matrix per distinct input, one product (out, in) x (in, in) a step",
    needs=("gram",),
    improve=improve,
    options=Options,
)
