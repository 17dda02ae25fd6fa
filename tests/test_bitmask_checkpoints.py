"""compressed-tensors' sparse-bitmask and sparse-24-bitmask, written here as its release 0.9.4 did, become dense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import RunCommand
from tests.tiny import load_plain

PARTS = {"compressed", "bitmask", "shape", "row_offsets"}


def _packed(mask: torch.Tensor) -> torch.Tensor:
    rows, columns = mask.shape
    bits = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.int64)
    bits[:, :columns] = mask
    return (bits.view(rows, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)


def masked(dense: Path, folder: Path, form: str) -> dict[str, torch.Tensor]:
    """Write the blocks' matrices in this form; returns the dense weights with the zeros that they now have."""
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": {"format": form}}
    (folder / "config.json").write_text(json.dumps(config))
    expected: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        stored: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(path).items():
            weight = tensor.clone()
            if tensor.ndim == 2 and ".layers." in name:
                groups = weight.view(-1, 4)
                groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
                if form == "sparse-bitmask":
                    weight[1] = 0
                module, mask = name.removesuffix(".weight"), weight != 0
                two_four = form == "sparse-24-bitmask"
                values = weight[mask].view(len(weight), -1) if two_four else weight[mask]
                shape = torch.tensor(weight.shape)
                stored[f"{module}.shape"] = shape[:, None] if two_four else shape
                stored |= {f"{module}.compressed": values, f"{module}.bitmask": _packed(mask)}
                if not two_four:
                    stored[f"{module}.row_offsets"] = mask.sum(1).cumsum(0) - mask.sum(1)
            else:
                stored[name] = weight
            expected[name] = weight
        save_file(stored, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return expected


@pytest.mark.parametrize("form", ["sparse-bitmask", "sparse-24-bitmask"])
def test_it_becomes_the_dense_model(form: str, llama: Path, tmp_path: Path, command: RunCommand) -> None:
    expected = masked(llama, tmp_path / "masked", form)
    told = command("prune", tmp_path / "masked", tmp_path / "out", "-m", "magnitude")
    assert told.code == 2
    assert f"has its zeros left out as {form} of compressed-tensors" in told.stderr
    assert "prune-cli convert --format dense" in told.stderr
    looked = command("inspect", tmp_path / "masked", "--json").json
    assert {t["name"]: (t["shape"], t["zeros"]) for t in looked["tensors"]} == {
        name: (list(tensor.shape), int((tensor == 0).sum())) for name, tensor in expected.items()
    }
    matrices = {name: tensor for name, tensor in expected.items() if tensor.ndim == 2 and ".layers." in name}
    assert {t["pattern"] for t in looked["tensors"] if t["name"] in matrices} == {"2:4"}
    parts = [t for path in (tmp_path / "masked").glob("*.safetensors") for t in load_file(path).items()]
    stored = sum(t.nbytes for name, t in parts if name.rpartition(".")[2] in PARTS)
    count = sum(tensor.numel() for tensor in matrices.values())
    (form_told,) = looked["formats"]
    assert (form_told["format"], form_told["tensors"], form_told["bytes"]) == (form, len(matrices), stored)
    assert form_told["bits_per_weight"] == 8 * stored / count
    shown = command("inspect", tmp_path / "masked").stdout
    assert "convert MODEL OUT --format dense" in " ".join(shown.split())
    assert command("convert", tmp_path / "masked", tmp_path / "dense", "--format", "dense", "-q").code == 0
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    model = load_plain(tmp_path / "dense")
    assert {n for n in expected if not torch.equal(model.state_dict()[n], expected[n])} == set()
    assert command("prune", tmp_path / "dense", tmp_path / "out", "-m", "magnitude", "-q").code == 0


def test_parts_that_do_not_fit_are_told(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    masked(llama, tmp_path / "masked", "sparse-bitmask")
    path = next(path for path in (tmp_path / "masked").glob("*.safetensors") if b"q_proj.bitmask" in path.read_bytes())
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.bitmask"))
    tensors[name] = tensors[name] | 1
    save_file(tensors, path, metadata={"format": "pt"})
    told = command("convert", tmp_path / "masked", tmp_path / "dense", "--format", "dense", "-q")
    assert told.code == 1
    assert f"but {name} has places for" in told.stderr
    refused = command("convert", tmp_path / "masked", tmp_path / "sparse", "-q")
    assert refused.code == 2
    assert "make it dense first, with --format dense" in refused.stderr
