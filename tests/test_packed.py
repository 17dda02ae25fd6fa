"""Packed models through the real command line: read, pruned, written plain or packed as they were."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.stream import Stream
from prune_cli.model.open_checkpoint import open_checkpoint
from prune_cli.packed.dequantised import Dequantised
from prune_cli.unstructured.prune_block import BlockPruner
from prune_cli.unstructured.prune_linear import LinearInputs
from tests import packed_files as packed
from tests.conftest import RunCommand, token_ids
from tests.tiny import load_plain, save_tiny

INT4 = packed.compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16)
QUICK = ("--samples", 4, "--seq-len", 24, "--quiet")


@dataclass(frozen=True)
class Packed:
    """A packed model, the plain one of the same values in bf16, and how transformers loads the former."""

    folder: Path
    twin: Path
    load: Callable[[], PreTrainedModel]


def _make(tmp: Path, kind: str) -> Packed:
    if kind == "gpt-oss":
        plain = save_tiny(tmp / "plain", "gpt_oss", dtype=torch.bfloat16)
        folder = packed.pack_gpt_oss(plain, tmp / "packed")
        return Packed(folder, twin_of(folder, tmp / "twin"), lambda: dequantised(folder, Mxfp4Config(dequantize=True)))
    if kind == "block-fp8":
        plain = save_tiny(tmp / "plain", "qwen3_moe", dtype=torch.bfloat16, moe_intermediate_size=32)
        folder = packed.pack_folder(plain, tmp / "packed", packed.block_fp8(), packed.FP8_SCHEME)
        twin = twin_of(folder, tmp / "twin")
        return Packed(folder, twin, lambda: dequantised(folder, FineGrainedFP8Config(dequantize=True)))
    plain = save_tiny(tmp / "plain", "llama-untied", dtype=torch.bfloat16)
    folder = packed.pack_folder(plain, tmp / "packed", packed.pack_quantized(), INT4)
    twin = twin_of(folder, tmp / "twin")
    # transformers needs a package more for this one; its values are held against a naive reference elsewhere.
    return Packed(folder, twin, lambda: load_plain(twin))


def dequantised(folder: Path, config: Any) -> PreTrainedModel:
    """In float32 throughout: transformers 5.23 leaves tensors that are not packed in the dtype they are stored in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).float().eval()


def twin_of(folder: Path, out: Path) -> Path:
    """The same files with plain bf16 weights, as somebody would convert them before pruning."""
    out.mkdir()
    checkpoint = open_checkpoint(folder)
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copyfile(file, out / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    half = {name: checkpoint.read(name).bfloat16().contiguous() for name in checkpoint.entries}
    save_file(half, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module", params=["block-fp8", "gpt-oss", "int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return _make(tmp_path_factory.mktemp(request.param), request.param)


def perplexity_of(model: PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    return math.exp(math.fsum(losses) / len(losses))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def values(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def done(command: RunCommand, *arguments: object) -> Any:
    result = command(*arguments)
    assert result.code == 0, result.stderr
    return result


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prune_report.json").read_text())


def test_eval_as_transformers(command: RunCommand, model: Packed, tokens_file: Path) -> None:
    found = done(command, "eval", model.folder, "--data", tokens_file, "--json").json
    assert found["evaluation"]["perplexity"] == pytest.approx(perplexity_of(model.load(), token_ids()), rel=1e-5)


def test_inspect_counts_values(command: RunCommand, model: Packed) -> None:
    found = done(command, "inspect", model.folder, "--json").json
    there = values(model.folder)
    assert {each["name"]: each["zeros"] for each in found["tensors"]} == {
        name: int((tensor == 0).sum()) for name, tensor in there.items()
    }
    (form,) = found["formats"]
    checkpoint = open_checkpoint(model.folder)
    assert isinstance(checkpoint, Dequantised)
    stored = weights(model.folder)
    names = [part for weight in checkpoint.weights.values() for part in (*weight.parts.values(), *weight.beside)]
    count = sum(there[name].numel() for name in checkpoint.weights)
    assert form["tensors"] == len(checkpoint.weights)
    assert form["parameters"] == count
    assert form["bits_per_weight"] == pytest.approx(8 * sum(stored[name].nbytes for name in names) / count)
    assert found["totals"][-1]["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert form["format"] in done(command, "inspect", model.folder).stdout


@pytest.mark.parametrize("model", ["gpt-oss", "int4"], indirect=True)
def test_bf16_as_from_its_plain_twin(command: RunCommand, model: Packed, tokens_file: Path, tmp_path: Path) -> None:
    options = ("--method", "sparsegpt", "--calibration", tokens_file, *QUICK)
    done(command, "prune", model.folder, tmp_path / "a", "--packed", "bf16", "--eval", tokens_file, *options)
    done(command, "prune", model.twin, tmp_path / "b", *options)
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    found = report(tmp_path / "a")["evaluation"]["after"]["perplexity"]
    assert found == pytest.approx(perplexity_of(load_plain(tmp_path / "a"), token_ids()), rel=1e-5)


# --- packed in, packed out ------------------------------------------------------------------------------------------


def test_keep_writes_masks_into_codes(
    command: RunCommand, model: Packed, tokens_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--method", "wanda", "--calibration", tokens_file, "--sparsity", 0.5, *QUICK)
    held, prune = {}, BlockPruner.prune

    def watch(pruner: BlockPruner, together: Sequence[LinearInputs]) -> None:
        prune(pruner, together)
        held.update({name: result.stored.dtype for name, result in pruner.pruned.items()})

    monkeypatch.setattr(BlockPruner, "prune", watch)
    done(command, "prune", model.folder, tmp_path / "out", *options)
    before, after = values(model.folder), values(tmp_path / "out")
    stored, new = weights(model.folder), weights(tmp_path / "out")
    checkpoint = open_checkpoint(model.folder)
    assert isinstance(checkpoint, Dequantised)
    codes = {weight.parts["codes"] for weight in checkpoint.weights.values()}
    # While a block is pruned, only codes of what is packed are kept.
    assert held
    for name, weight in checkpoint.weights.items():
        assert name not in held or held[name] == stored[weight.parts["codes"]].dtype
    assert stored.keys() == new.keys()
    told = {tensor["name"]: tensor for tensor in report(tmp_path / "out")["tensors"]}
    pruned = {name for name, tensor in told.items() if tensor["action"] == "pruned"}
    for name, tensor in stored.items():  # scales and all that is not pruned are bit-identical
        if name not in codes and name not in pruned:
            assert torch.equal(as_bytes(tensor), as_bytes(new[name])), name
    headers = Checkpoint.open(tmp_path / "out").entries
    for name, tensor in after.items():
        weight = checkpoint.weights.get(name)
        assert told[name]["dtype"] == headers[name if weight is None else weight.parts["codes"]].dtype
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept])
        assert told[name]["sparsity"] == pytest.approx(1 - float(kept.double().mean()))
        assert not any("scales" in note for note in told[name]["notes"])
    assert 0.4 < 1 - float((after[next(iter(pruned))] != 0).double().mean()) < 0.6
    assert (tmp_path / "out" / "config.json").read_bytes() == (model.folder / "config.json").read_bytes()
    done(command, "verify", tmp_path / "out", "--against", model.folder)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("model", ["block-fp8"], indirect=True)
def test_keep_requantises_new_values(command: RunCommand, model: Packed, tokens_file: Path, tmp_path: Path) -> None:
    options = ("--method", "sparsegpt", "--calibration", tokens_file, *QUICK)
    done(command, "prune", model.folder, tmp_path / "out", "--packed", "keep", *options)
    stored, new = weights(model.folder), weights(tmp_path / "out")
    checkpoint = open_checkpoint(model.folder)
    assert isinstance(checkpoint, Dequantised)
    for weight in checkpoint.weights.values():
        assert torch.equal(as_bytes(stored[weight.parts["scales"]]), as_bytes(new[weight.parts["scales"]]))
    told = report(tmp_path / "out")
    for tensor in told["tensors"]:
        if tensor["action"] == "pruned" and tensor["name"] in checkpoint.weights:
            assert any("a relative error of 0." in note for note in tensor["notes"])
            assert tensor["sparsity"] >= 0.5 - 1e-9


@pytest.mark.parametrize("model", ["int4"], indirect=True)
def test_a_sweep_measures_what_prune_writes(
    command: RunCommand, model: Packed, tokens_file: Path, tmp_path: Path
) -> None:
    data = ("--calibration", tokens_file, "--data", tokens_file, "--sparsity", "0.6", "--sensitivity", "0")
    for choice in ("keep", "bf16"):
        swept = done(command, "sweep", model.folder, tmp_path / f"sweep-{choice}", *data, "--packed", choice, "--json")
        out = tmp_path / choice
        pruned = ("--calibration", tokens_file, "--eval", tokens_file, "-s", "0.6", "--packed", choice)
        done(command, "prune", model.folder, out, *pruned)
        measured = report(out)["evaluation"]
        assert swept.json["dense"]["perplexity"] == measured["before"]["perplexity"]
        assert swept.json["points"][0]["evaluation"]["perplexity"] == measured["after"]["perplexity"]
    against = ("--data", tokens_file, "--against", model.folder, "--max-perplexity-increase", "900%")
    done(command, "check", tmp_path / "keep", *against)


@pytest.mark.parametrize("model", ["int4"], indirect=True)
def test_dry_run_tells_how_the_output_is_stored(command: RunCommand, model: Packed, tmp_path: Path) -> None:
    for choice, words in (("keep", "so is the output"), ("bf16", "the output is plain")):
        options = ("--method", "magnitude", "--dry-run", "--json", "--packed", choice)
        assert words in done(command, "prune", model.folder, tmp_path / "out", *options).json["packed"]


@pytest.mark.parametrize("model", ["int4"], indirect=True)
def test_an_interrupted_run_writes_the_same_bytes(
    command: RunCommand, model: Packed, tokens_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--method", "wanda", "--calibration", tokens_file, *QUICK)
    done(command, "prune", model.folder, tmp_path / "a", *options)
    whole = Stream.unload

    def stop(stream: Stream, block: int) -> None:
        whole(stream, block)
        if block == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "unload", stop)
        assert command("prune", model.folder, tmp_path / "b", *options).code == 130
    done(command, "prune", model.folder, tmp_path / "b", "--resume", *options)
    for name, tensor in weights(tmp_path / "a").items():
        assert torch.equal(as_bytes(tensor), as_bytes(weights(tmp_path / "b")[name])), name
