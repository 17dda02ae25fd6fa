"""The output folder: what is copied, what is refused, and that a killed run ends in the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prune_cli.checkpoint.file_names import partial_folder
from tests.conftest import RunCommand, folder_bytes
from tests.tiny import save_tiny


def test_untouched_tensors_and_side_files_are_copied_byte_for_byte(
    tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", "llama-tied")
    (model / "README.md").write_text("# a card\n")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "templates").mkdir()
    (model / "templates" / "tool.jinja").write_text("{{ tools }}")
    (model / "pytorch_model.bin").write_bytes(b"never opened")
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").write_text("")
    out = tmp_path / "out"
    assert command("prune", model, out, "--calibration", tokens_file, "-q").code == 0
    before, after = folder_bytes(model), folder_bytes(out)
    assert set(after) == set(before) - {"pytorch_model.bin", ".cache/lock"} | {"SOURCE_README.md"}
    before["SOURCE_README.md"] = (model / "README.md").read_bytes()
    for name, content in after.items():
        if not name.endswith(".safetensors"):
            assert content == before[name], name
    for shard in model.glob("*.safetensors"):
        dense, pruned = load_file(shard), load_file(out / shard.name)
        assert list(dense) == list(pruned)
        for name, tensor in pruned.items():
            if "_proj" not in name:
                assert torch.equal(tensor, dense[name])
    report = json.loads((out / "prune_report.json").read_text())
    assert any("pytorch_model.bin was not copied" in warning for warning in report["warnings"])


def test_an_existing_output_is_refused_before_any_work(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    refused = command("prune", llama, out, "-m", "magnitude")
    assert refused.code == 2
    assert "exists already" in refused.stderr
    overwrite = command("prune", llama, out, "-m", "magnitude", "--overwrite")
    assert overwrite.code == 2
    assert "is no checkpoint folder" in overwrite.stderr
    assert (out / "precious.txt").read_text() == "keep me"
    assert not partial_folder(out).exists()


def test_overwrite_replaces_an_earlier_output(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    out = tmp_path / "out"
    assert command("prune", llama, out, "-m", "magnitude", "-s", 0.3, "-q").code == 0
    first = folder_bytes(out)
    assert command("prune", llama, out, "-m", "magnitude", "-s", 0.6, "-q", "--overwrite").code == 0
    assert folder_bytes(out) != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("where", ["itself", "inside", "around"])
def test_output_and_model_must_not_lie_in_each_other(where: str, tmp_path: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "a" / "model", "llama-tied")
    out = {"itself": model, "inside": model / "out", "around": tmp_path / "a"}[where]
    refused = command("prune", model, out, "-m", "magnitude", "--overwrite")
    assert refused.code == 2
    assert "lie in each other" in refused.stderr


def test_too_little_disk_space_is_told_before_any_work(
    llama: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
    refused = command("prune", llama, tmp_path / "out", "-m", "magnitude")
    assert refused.code == 2
    assert "free" in refused.stderr
    assert not partial_folder(tmp_path / "out").exists()
