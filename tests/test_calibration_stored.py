"""Text that was tokenised before: rows of ids in a .safetensors file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calibration.errors import CalibrationError
from calibration.sources import Role
from tests.calibration_texts import load


def ids_file(folder: Path, ids: torch.Tensor, name: str = "input_ids") -> Path:
    path = folder / "ids.safetensors"
    save_file({name: ids}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_stored_ids_are_used_as_they_are(role: Role, dtype: torch.dtype, tmp_path: Path) -> None:
    ids = torch.arange(12).reshape(4, 3)
    path = ids_file(tmp_path, ids.to(dtype))
    tokens = load(path, None, role, vocab_size=12)
    assert torch.equal(tokens.ids, ids)
    assert (tokens.ids.dtype, tokens.seed, tokens.available_tokens) == (torch.int64, None, 12)
    assert (tokens.source, tokens.warnings) == (str(path), ())
    assert tokens.sha256 == hashlib.sha256(b"(4, 3)" + ids.numpy().astype("<i8").tobytes()).hexdigest()
    assert torch.equal(load(path, None, role, samples=2, seq_len=3).ids, ids[:2])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.ones(2, 3), {}, r"is \[2, 3\] of float32: save integers of shape \(samples, length\)"),
        (torch.ones(2, 3, dtype=torch.bool), {}, "of bool"),
        (torch.ones(6, dtype=torch.int64), {}, r"is \[6\] of int64"),
        (torch.ones(0, 3, dtype=torch.int64), {}, r"is \[0, 3\] of int64"),
        (torch.tensor([[1, -5]]), {}, r"ids\.safetensors gives the token -5, but the model knows 0 to 9: use a file"),
        (torch.tensor([[1, 10]]), {}, r"ids\.safetensors gives the token 10, but the model knows 0 to 9"),
        (torch.ones(2, 3, dtype=torch.int64), {"seq_len": 4}, "holds samples of 3 tokens, .* leave out --seq-len 4"),
        (torch.ones(2, 3, dtype=torch.int64), {"samples": 4}, "holds 2 samples, but --samples asks for 4"),
    ],
)
def test_stored_ids_that_do_not_do(ids: torch.Tensor, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(ids_file(tmp_path, ids), None, vocab_size=10, **options)


def test_a_file_without_stored_ids(tmp_path: Path) -> None:
    path = ids_file(tmp_path, torch.ones(2, 3), "weight")
    with pytest.raises(CalibrationError, match="has no tensor input_ids, but weight: rename"):
        load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(CalibrationError, match="is no readable safetensors file"):
        load(path)
