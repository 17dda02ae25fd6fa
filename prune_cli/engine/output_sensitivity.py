"""How much what a block returns changes with each output of its linear layers, by backward passes of the dense block.

For a random r of independent normal numbers per token, scaled to the size of the token's own hidden state, the mean of
(d r.B / d y_o)^2 is the mean squared change of the block's output B, relative to it, for a unit change of output o
(Hutchinson's estimator of the squared rows of a Jacobian).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from calibration.batch import Batch
from prune_cli.engine.block_outputs import hidden_states
from prune_cli.engine.padding import real_rows
from prune_cli.engine.seeds import seed_of
from prune_cli.engine.stream import Stream

# A mean over so many tokens tells rows apart well enough; more would only cost time.
TOKENS = 4096


@dataclass(frozen=True)
class Sensitivity:
    """Sums over tokens of one linear layer: `outputs` (out,) of the squared derivatives, `inputs` (in,) of squares."""

    outputs: torch.Tensor
    inputs: torch.Tensor


def first_batches(batches: Sequence[Batch]) -> list[Batch]:
    """As many as the sensitivities are measured on."""
    found: list[Batch] = []
    for batch in batches:
        if sum(each.tokens for each in found) >= TOKENS:
            break
        found.append(batch)
    return found


def output_sensitivity(
    stream: Stream, block: int, names: Sequence[str], batches: Sequence[Batch], seed: int
) -> dict[str, Sensitivity]:
    """By name those of `names`, linear layers of `block`, that a batch reaches; `stream` waits before it, loaded.

    `batches` are the first of the stream's. Raises RuntimeError where torch has no derivative of the block.
    """
    generator = torch.Generator().manual_seed(seed_of(f"sensitivity of block {block}", seed))
    found: dict[str, Sensitivity] = {}
    for call, batch in zip(stream.calls(), batches, strict=False):
        with torch.enable_grad(), _passing(stream, names) as passed:
            states = real_rows(hidden_states(call()), batch).float()
            total = (states * _direction(states.detach(), generator)).sum()
        if not passed:
            continue
        derivatives = torch.autograd.grad(total, [output for _, _, output in passed], allow_unused=True)
        for (name, rows, _), derivative in zip(passed, derivatives, strict=True):
            if derivative is not None:
                _add(found, name, _sums(derivative), _sums(real_rows(rows, batch)))
    return found


def _direction(states: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """r (tokens, hidden) for `states` (tokens, hidden); drawn on the host, for one stream of numbers."""
    size = states.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.randn(states.shape, generator=generator).to(states.device) / size


# Of one call of a linear layer: its name, what went in, and what came out.
_Passed = tuple[str, torch.Tensor, torch.Tensor]


@contextmanager
def _passing(stream: Stream, names: Sequence[str]) -> Iterator[list[_Passed]]:
    """Within, the calls of the linear layers `names`, with outputs that have derivatives."""
    passed: list[_Passed] = []

    def keep(name: str) -> Callable[..., torch.Tensor]:
        def hook(_module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            passed.append((name, arguments[0].detach(), output.requires_grad_()))
            return output.clone()  # the block may change its own in place

        return hook

    hooks = [stream.module(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield passed
    finally:
        for each in hooks:
            each.remove()


def _sums(rows: torch.Tensor) -> torch.Tensor:
    """Of squares, over all but the last dimension."""
    return rows.float().square().reshape(-1, rows.shape[-1]).sum(0)


def _add(found: dict[str, Sensitivity], name: str, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
    before = found.get(name)
    found[name] = (
        Sensitivity(outputs, inputs)
        if before is None
        else Sensitivity(before.outputs + outputs, before.inputs + inputs)
    )
