"""A file that is written in one rename."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from prune_cli.checkpoint import whole_file
from prune_cli.checkpoint.whole_file import save_whole


def test_what_was_there_stays_till_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, turned = tmp_path / "kept.safetensors", torch.arange(6.0).reshape(2, 3).T
    save_whole(path, {"a": turned}, "key", {"step": 1})
    written = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("a"), turned)
        assert file.metadata() == {"key": '{"step": 1}'}

    def half(_tensors: object, beside: Path, _metadata: object) -> None:
        beside.write_bytes(written[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr(whole_file, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        save_whole(path, {"a": turned + 1}, "key", {"step": 2})
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]
