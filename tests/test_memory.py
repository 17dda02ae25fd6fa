"""One block in memory: the peak does not grow with the depth of the model."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prune_cli.engine.memory import PeakMemory
from tests.conftest import token_ids
from tests.forked import ForkedRun
from tests.tiny import save_tiny

PAGE = os.sysconf("SC_PAGE_SIZE")
WIDE: dict[str, Any] = {
    "hidden_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def peak_of(*arguments: object) -> int:
    """The highest anonymous memory of a `prune-cli` process, watched from outside."""
    process = ForkedRun(*arguments)
    status = Path(f"/proc/{process.pid}/statm")
    peak = 0
    while process.poll() is None:
        try:
            _, resident, shared, *_ = status.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            break  # it has ended since
        peak = max(peak, (int(resident) - int(shared)) * PAGE)
        time.sleep(0.003)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return peak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_comes_and_goes_is_seen() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        taken = torch.ones(1 << 24)
        time.sleep(0.2)
        del taken
    before = memory.host_bytes
    with PeakMemory(torch.device("cpu")) as memory:
        time.sleep(0.1)
    assert before > memory.host_bytes + (1 << 25)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--calibrate-by", "sublayer"],
        ["-m", "admm", "-o", "steps=2", "--target", "dense", "--allocate", "sensitivity", "--self-calibration", "1"],
    ],
    ids=" ".join,
)
def test_more_blocks_take_the_same_memory(arguments: list[str], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": token_ids(samples=2, length=16)}, tokens)
    # Small Gram matrices for the solver: large ones come and go, and would hide a block's few MiB.
    intermediate = 384 if "admm" in arguments else 1536
    block_bytes = 4 * (384 * 384 * 3 + 384 * intermediate * 3)
    shape = {**WIDE, "intermediate_size": intermediate}
    peaks = []
    for blocks in (4, 16):
        model = save_tiny(tmp_path / f"model-{blocks}", "llama-untied", num_hidden_layers=blocks, **shape)
        out = tmp_path / f"out-{blocks}"
        peaks.append(peak_of("prune", model, out, "--calibration", tokens, *arguments, "-q"))
    # Allocators differ by some percent from run to run; the other twelve blocks would take twice what is allowed.
    assert peaks[1] < peaks[0] + 6 * block_bytes
