"""Where batches wait when several maps of a block read the same tensor."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence

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


class Experts(nn.Module):
    """`even` is called for batches of an even length alone, `odd` for the others, and `all` for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd, self.all = (nn.Linear(3, 3, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.all(x + (self.even(x) if len(x) % 2 == 0 else self.odd(x)))


@pytest.mark.parametrize("lengths", [[[2, 4], [3]], [[3, 2], [5, 1]], [[2], []], [[], [1]]])
def test_processes_stop_at_the_same_maps_also_where_no_batch_of_theirs_comes_by(lengths: list[list[int]]) -> None:
    votes, meeting = [0] * len(lengths), threading.Barrier(len(lengths), timeout=20)

    def agree_as(number: int) -> Callable[[int], int]:
        def agree(place: int) -> int:
            votes[number] = place
            meeting.wait()
            least = min(votes)
            meeting.wait()
            return least

        return agree

    def conduct(number: int, own: list[int], found: list[list[tuple[str, list[int]]]]) -> None:
        block = copy.deepcopy(shared)
        maps: dict[nn.Module, str] = {block.even: "even", block.odd: "odd", block.all: "all"}
        batches = [torch.rand(length, 3) for length in own]
        with torch.no_grad(), Lockstep(block, [block], batches, agree=agree_as(number)) as lockstep:
            lockstep.start()
            found[number] = [(name, [len(x) for x in inputs]) for name, inputs in lockstep.pause_at(0, maps)]

    shared = Experts()
    found: list[list[tuple[str, list[int]]]] = [[] for _ in lengths]
    threads = [threading.Thread(target=conduct, args=(*each, found)) for each in enumerate(lengths)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [length for own in lengths for length in own]
    met = [name for name, rest in (("even", 0), ("odd", 1)) if any(length % 2 == rest for length in everything)]
    for own, stops in zip(lengths, found, strict=True):
        even, odd = ([length for length in own if length % 2 == rest] for rest in (0, 1))
        expected = {"even": even, "odd": odd, "all": own}
        assert stops == [(name, expected[name]) for name in (*met, "all")]
