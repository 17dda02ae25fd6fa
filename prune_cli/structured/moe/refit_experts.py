"""`-o after=refit`: the last layer of each expert that stays is fitted to what the mixture lacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.statistics import Cross, Gram
from methods.structured._expert_refit import gated_rows, refit_down
from prune_cli.engine.memory import device_of_gram
from prune_cli.errors import PruneError
from prune_cli.model.moe import before_down, outputs_of
from prune_cli.structured.moe.both_mixtures import BothMixtures
from prune_cli.structured.moe.expert_matrices import ExpertMatrices

# Over the experts; each follows what the others then make.
_SWEEPS = 3
# Pull towards the weights as they were, as a share of each input's square.
_DAMPING = 0.01


def refit_experts(both: BothMixtures, targets: Sequence[torch.Tensor], matrices: ExpertMatrices) -> list[float]:
    """Fit all experts in sweeps; the held-out error after each, of which the last may be of a sweep that was undone.

    A sweep that does not lower it is undone and ends the fit. Raises PruneError naming a tensor that cannot be fitted.
    """
    outputs = both.outputs()
    least = both.error(outputs, targets)
    errors: list[float] = []
    for _ in range(_SWEEPS):
        before = matrices.snapshot()
        for expert in range(both.mixture.experts):
            _refit(both, targets, outputs, matrices, expert)
        errors.append(both.error(outputs, targets))
        if not errors[-1] < least:
            matrices.restore(before)
            break
        least = errors[-1]
    return errors


def _refit(
    both: BothMixtures,
    targets: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    matrices: ExpertMatrices,
    expert: int,
) -> None:
    """One expert; `outputs` are those of the mixture, and change with it."""
    here = both.smaller
    (name,) = matrices.names(expert, down=True)
    weight, bias = matrices.matrix(name, expert), matrices.bias(name, expert)
    start = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    device = device_of_gram(start.shape[1], weight.device, 1)
    gram, cross = Gram(start.shape[1], device), Cross(len(start), start.shape[1], device)
    numbers = here.tokens_of(expert)
    for batch, tokens, output, target, fitted in zip(here.batches, numbers, outputs, targets, both.fitted, strict=True):
        if len(tokens):
            gates, rows = batch.gates_of(expert, tokens), batch.hidden[tokens]
            output.index_add_(0, tokens, _made(both, expert, rows, gates), alpha=-1)
            if fitted:
                inputs = gated_rows(before_down(here.module, expert, rows).float(), gates, constant=bias is not None)
                gram.add(inputs)
                cross.add(target[tokens] - output[tokens], inputs)
    here.ranks.add_up(gram.total)
    here.ranks.add_up(cross.total)
    _solve(matrices, name, expert, start.to(device), gram.value(), cross.value())
    for batch, tokens, output in zip(here.batches, numbers, outputs, strict=True):
        if len(tokens):
            rows = batch.hidden[tokens]
            output.index_add_(0, tokens, _made(both, expert, rows, batch.gates_of(expert, tokens)))


def _made(both: BothMixtures, expert: int, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return outputs_of(both.smaller.module, expert, rows).float() * gates.float()[:, None]


def _solve(
    matrices: ExpertMatrices, name: str, expert: int, start: torch.Tensor, gram: torch.Tensor, target: torch.Tensor
) -> None:
    if not bool(gram.diagonal().any()):
        return  # no fitted token comes here
    if not bool(torch.isfinite(gram).all() & torch.isfinite(target).all()):
        raise PruneError(f"The inputs of {name} are not finite: the forward pass overflows; try --dtype float32.")
    try:
        new, _ = refit_down(start, gram, target, _DAMPING)
    except ValueError as error:
        raise PruneError(f"{name} cannot be fitted for expert {expert}: {error}") from error
    bias = matrices.bias(name, expert)
    width = start.shape[1] - (bias is not None)
    matrices.put(name, expert, new[:, :width], None if bias is None else new[:, -1])
