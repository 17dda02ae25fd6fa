"""Where batches wait when several maps of a block read the same tensor."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from prune_cli.engine.lockstep import Lockstep
from prune_cli.errors import PruneError


class Block(nn.Module):
    """`gate` and `up` read the same tensor, unless a batch's first number is negative; `down` reads what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(3, 3, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x + 1 if x[0, 0] < 0 else x
        return x + self.down(self.gate(x) * self.up(other))


def stopped_at(block: Block, batches: Sequence[torch.Tensor]) -> list[tuple[str, int, list[torch.Tensor]]]:
    """For every stop its name, how many batches have passed `gate` by then, and the inputs there."""
    passed: list[int] = []
    block.gate.register_forward_hook(lambda *_: passed.append(1))
    maps: dict[nn.Module, str] = {block.gate: "gate", block.up: "up", block.down: "down"}
    found = []
    with Lockstep(block, [block], batches) as lockstep:
        lockstep.start()
        for name, inputs in lockstep.pause_at(0, maps):
            found.append((name, len(passed), [tensor.clone() for tensor in inputs]))
        list(lockstep.finish())
    return found


def test_maps_that_share_an_input_are_served_before_the_batches_go_on() -> None:
    block, batches = Block(), [torch.rand(2, 3) for _ in range(3)]
    with torch.no_grad():
        gate, up, down = stopped_at(block, batches)
        made = [block.gate(batch) * block.up(batch) for batch in batches]
    assert [gate[:2], up[:2], down[:2]] == [("gate", 0), ("up", 1), ("down", 3)]
    for inputs, expected in ((gate[2], batches), (up[2], batches), (down[2], made)):
        assert all(torch.equal(a, b) for a, b in zip(inputs, expected, strict=True))


def test_a_batch_that_goes_its_own_way_is_no_silent_mistake() -> None:
    batches = [torch.rand(2, 3), -torch.rand(2, 3)]
    with torch.no_grad(), pytest.raises(PruneError, match="do not take the same way"):
        stopped_at(Block(), batches)


def test_when_the_first_batch_goes_its_own_way_all_stop_as_usual() -> None:
    batches = [-torch.rand(2, 3), -torch.rand(2, 3)]
    with torch.no_grad():
        assert [stop[:2] for stop in stopped_at(Block(), batches)] == [("gate", 0), ("up", 2), ("down", 2)]
