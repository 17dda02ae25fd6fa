"""Outputs whose tensors have other names and shapes than the input's: what is written where, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from prune_cli.checkpoint.file_names import partial_folder
from prune_cli.checkpoint.layout import Layout, OutputTensor, changed_layout, same_layout
from prune_cli.checkpoint.output_folder import OutputFolder
from prune_cli.checkpoint.reader import INDEX_FILE, Checkpoint
from prune_cli.errors import PruneError
from tests.tiny import save_tiny


def _without_the_first_block(source: Checkpoint) -> dict[str, OutputTensor]:
    """Blocks 1 and 2 become 0 and 1; every down projection loses half of its inputs."""
    planned: dict[str, OutputTensor] = {}
    for name, entry in source.entries.items():
        if ".layers.0." in name:
            continue
        new = name.replace(".layers.1.", ".layers.0.").replace(".layers.2.", ".layers.1.")
        narrowed = (entry.shape[0], entry.shape[1] // 2) if "down_proj" in name else None
        planned[new] = OutputTensor(name, narrowed)
    return planned


def _write(source: Checkpoint, layout: Layout, out: Path, *, resume: bool = False) -> None:
    with OutputFolder(out, source) as output:
        output.begin({"method": "test"}, resume=resume)
        output.lay_out(layout)
        for block in range(2):
            name = f"model.layers.{block}.mlp.down_proj.weight"
            if block not in output.done:
                old = source.read(layout_source(layout, name, source))
                output.write_block(block, {name: old[:, : old.shape[1] // 2]}, {})
        output.commit({}, config='{"changed": true}\n')


def layout_source(layout: Layout, name: str, source: Checkpoint) -> str:
    return _without_the_first_block(source)[name].source


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_lie_where_the_layout_says(shards: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama-untied", shards=shards, dtype=dtype)
    source = Checkpoint.open(folder)
    planned = _without_the_first_block(source)
    layout = changed_layout(source, planned)
    out = tmp_path / "out"
    _write(source, layout, out)
    written = {name: tensor for file in layout.files for name, tensor in load_file(out / file).items()}
    assert written.keys() == planned.keys()
    for name, tensor in written.items():
        old = source.read(planned[name].source)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, old[:, : old.shape[1] // 2] if planned[name].shape else old)
    reopened = Checkpoint.open(out)
    assert reopened.entries == layout.entries
    assert reopened.nbytes == layout.nbytes < source.nbytes
    assert json.loads((out / "config.json").read_text()) == {"changed": True}
    for file in layout.files:
        with safe_open(out / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    if shards:
        index = json.loads((out / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
        assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in written.values())
        assert index["weight_map"] == {name: entry.file for name, entry in sorted(layout.entries.items())}
    else:
        assert not (out / INDEX_FILE).exists()


def test_a_shard_without_tensors_is_left_out(tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "model", "llama-untied"))
    first = source.files[0]
    planned = {name: OutputTensor(name) for name, entry in source.entries.items() if entry.file != first}
    layout = changed_layout(source, planned)
    assert layout.files == source.files[1:]


def test_a_stopped_run_continues_only_with_the_same_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "model", "llama-untied"))
    layout = changed_layout(source, _without_the_first_block(source))
    _write(source, layout, tmp_path / "expected")
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "commit", lambda *_, **__: (_ for _ in ()).throw(PruneError("pulled plug")))
        with pytest.raises(PruneError, match="pulled plug"):
            _write(source, layout, out)
    other = changed_layout(source, {name: OutputTensor(name) for name in source.entries})
    with pytest.raises(PruneError, match="other tensors"):
        _write(source, other, out, resume=True)
    made: list[str] = []
    monkeypatch.setattr(Layout, "make_file", lambda *arguments: made.append(arguments[1]))
    _write(source, layout, out, resume=True)
    assert not made
    assert not partial_folder(out).exists()
    for file in (*layout.files, INDEX_FILE, "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_the_same_layout_is_the_input_itself(llama: Path) -> None:
    source = Checkpoint.open(llama)
    layout = same_layout(source)
    assert layout.entries == source.entries
    assert layout.index == (llama / INDEX_FILE).read_text()
