"""Outputs loaded by plain transformers in one process that cannot import prune-cli, for every structured method."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prune_cli.model.architecture import find_blocks
from tests.forked import run_program
from tests.tiny import load_plain


@dataclass(frozen=True)
class Loaded:
    """What `elsewhere.py` found in an output, and the logits of the ids that it was given."""

    found: Mapping[str, Any]
    logits: torch.Tensor

    def is_whole(self) -> None:
        """Assert that nothing was missing or left over, and that the model can be used, saved and read again."""
        for trouble in ("missing", "unexpected", "mismatched"):
            assert self.found[trouble] == []
        assert self.found["new_tokens"] > 0
        assert self.found["same_after_saving_again"]
        assert self.found["text_kept"]


def load_elsewhere(outputs: Mapping[str, Path], ids: torch.Tensor, scratch: Path) -> dict[str, Loaded]:
    """Load every output (name -> folder) in one new process that cannot import our code."""
    scratch.mkdir()
    save_file({"input_ids": ids}, scratch / "ids.safetensors")
    (scratch / "jobs.json").write_text(json.dumps({name: str(folder) for name, folder in outputs.items()}))
    program = Path(__file__).with_name("elsewhere.py").read_text()
    files = [scratch / "jobs.json", scratch / "ids.safetensors", scratch / "results.json"]
    done = run_program(program, *files, cwd=scratch)
    assert done.returncode == 0, done.stderr
    found = json.loads((scratch / "results.json").read_text())
    logits = load_file(scratch / "results.safetensors")
    return {name: Loaded(found[name], logits[name]) for name in outputs}


@torch.no_grad()
def logits_without_blocks(folder: Path, removed: Iterable[int], ids: torch.Tensor) -> torch.Tensor:
    """Of the whole dense model, in which the blocks `removed` run but hand on their input."""
    model = load_plain(folder)
    _, blocks = find_blocks(model)
    for index in removed:
        blocks[index].forward = handing_on(blocks[index].forward)
    return model(input_ids=ids, use_cache=False).logits


def handing_on(original: Any) -> Any:
    """A block's forward that runs it and returns its input in place of its hidden states."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        output = original(hidden.clone(), *args[1:], **kwargs) if args else original(**kwargs)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    return forward
