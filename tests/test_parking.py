"""Inputs that wait in files change nothing but memory."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from prune_cli.engine import activation_offload as parking
from prune_cli.engine.activation_budget import ActivationBudget
from tests.forked import run_program


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_keeps_its_bits_in_a_file_and_leaves_none_behind(dtype: torch.dtype, tmp_path: Path) -> None:
    there = parking.ActivationOffload(tmp_path, ActivationBudget(inputs=3000))
    tensors = [torch.randn(5, 7, 20, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(4)]
    copies, addresses = [tensor.clone() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    for _ in range(2):  # a second map brings the same tensors
        there.next_layer()
        for tensor in tensors:
            there.hold(tensor)
    moved = [tensor.data_ptr() != address for tensor, address in zip(tensors, addresses, strict=True)]
    in_memory = 3000 // tensors[0].nbytes
    assert moved == [False] * in_memory + [True] * (4 - in_memory)
    after = [tensor.data_ptr() for tensor in tensors]
    there.hold(tensors[3])
    assert tensors[3].data_ptr() == after[3], "what waits in a file is not written again"
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
    tensors[3].add_(1)
    assert torch.equal(tensors[3], copies[3] + 1)
    assert not list(tmp_path.iterdir())


def test_without_space_it_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parking, "_in_a_file", full)
    tensor = torch.ones(10)
    address = tensor.data_ptr()
    parking.ActivationOffload(tmp_path, ActivationBudget.of(0)).hold(tensor)
    assert tensor.data_ptr() == address


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc")
def test_memory_between_live_pieces_is_returned() -> None:
    """In a process of its own: the setting stays for good."""
    code = """
import torch
from prune_cli.engine.memory import _host_bytes, mmap_large_allocations
torch.ones(1 << 18)  # once it is freed, glibc by itself takes such pieces from the heap
mmap_large_allocations()
pieces = [torch.ones(1 << 18) for _ in range(200)]
before = _host_bytes()
del pieces[::2]
print(before - _host_bytes())
"""
    freed = run_program(code)
    assert freed.returncode == 0, freed.stderr
    assert int(freed.stdout) > 0.9 * 100 * 2**20, freed.stdout
