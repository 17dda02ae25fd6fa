"""`prune-cli verify`: sound outputs pass, and every kind of damage is told by name with exit code 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.broken import INDEX, SHARD, change_config, change_index
from tests.conftest import Outcome, RunCommand
from tests.tiny import save_tiny

_UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    return save_tiny(folder / "dense", "llama-untied", shards=False, hidden_size=64, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A pruned model, made once for the same options; `sparse` converts it."""
    from prune_cli import prune
    from prune_cli.sparse.convert import ConvertRequest, convert

    folders: dict[str, Path] = {}

    def make(*, sparse: bool = False, **options: Any) -> Path:
        key = str((sparse, options))
        if key not in folders:
            folder = tmp_path_factory.mktemp("pruned") / "model"
            if sparse:
                convert(ConvertRequest(str(make(**options)), folder, "sparse"))
            else:
                prune(dense, folder, **{"method": "magnitude", **options})
            folders[key] = folder
        return folders[key]

    return make


def _copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def _wrong(outcome: Outcome) -> dict[str, str]:
    assert outcome.code == 1, outcome
    return {problem["name"]: problem["problem"] for problem in outcome.json["problems"]}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, {"method": "sparsegpt", "samples": 4, "seq_len": 32}])
def test_sound_outputs_pass(
    sparse: bool, options: dict[str, Any], made: Callable[..., Path], dense: Path, command: RunCommand
) -> None:
    found = command("verify", made(sparse=sparse, **options), "--against", dense, "--json", "-q")
    assert found.code == 0, found
    assert found.json["problems"] == []
    assert ("values of the kept weights" in str(found.json["skipped"])) == ("method" in options)
    assert ("checksums of 30 tensors" in str(found.json["checked"])) == sparse


def test_a_checkpoint_without_a_report_is_held_against_the_dense_one(
    made: Callable[..., Path], dense: Path, tmp_path: Path, command: RunCommand
) -> None:
    folder = _copy(made(), tmp_path)
    (folder / "prune_report.json").unlink()
    found = command("verify", folder, "--against", dense)
    assert found.code == 0
    assert "is sound" in found.stdout
    assert "there is no prune_report.json" in found.stdout


@pytest.mark.parametrize("sparse", [False, True])
def test_a_changed_weight_is_told(
    sparse: bool, made: Callable[..., Path], dense: Path, tmp_path: Path, command: RunCommand
) -> None:
    """Damage that a sparse file was made from has right checksums: the report and the dense model tell it."""
    folder = _copy(made(), tmp_path)
    tensors = load_file(folder / SHARD)
    kept = tensors[_UP].nonzero()[0]
    tensors[_UP][tuple(kept)] *= 2
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    if sparse:
        assert command("convert", folder, tmp_path / "sparse", "-q").code == 0
        folder = tmp_path / "sparse"
    wrong = _wrong(command("verify", folder, "--against", dense, "--json", "-q"))
    assert wrong.keys() == {SHARD, _UP, "lm_head.weight"}
    assert "in 1 weights that were kept" in wrong[_UP]
    assert "not pruned" in wrong["lm_head.weight"]
    assert "sha256" in wrong[SHARD]


def test_zeros_and_patterns_that_are_not_the_reports_are_told(
    made: Callable[..., Path], tmp_path: Path, command: RunCommand
) -> None:
    folder = _copy(made(pattern="2:4"), tmp_path)
    tensors = load_file(folder / SHARD)
    tensors[_UP][tuple((tensors[_UP] == 0).nonzero()[0])] = 1
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    found = command("verify", folder)
    assert found.code == 1
    assert f"Wrong: {_UP} does not keep 2 of every 4 weights" in found.stdout
    assert f"{_UP} has 2047 zeros, prune_report.json has 2048" in found.stdout


def test_damage_in_a_sparse_file_is_told_once_by_name(
    made: Callable[..., Path], tmp_path: Path, command: RunCommand
) -> None:
    folder = _copy(made(sparse=True), tmp_path)
    path = folder / SHARD
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    content[end + header[_UP]["data_offsets"][0] + 1] ^= 1
    path.write_bytes(content)
    wrong = _wrong(command("verify", folder, "--json", "-q"))
    assert list(wrong) == [_UP]
    assert "is damaged: its checksum" in wrong[_UP]
    assert command("convert", folder, tmp_path / "back", "--format", "dense", "-q").code == 1
    assert not (tmp_path / "back").exists()


def test_config_and_files_must_agree(made: Callable[..., Path], tmp_path: Path, command: RunCommand) -> None:
    folder = change_config(_copy(made(sparse=True), tmp_path), quantization_config=None)
    assert "config.json does not say so" in _wrong(command("verify", folder, "--json", "-q"))["config.json"]


def test_missing_and_foreign_tensors_are_told(
    made: Callable[..., Path], dense: Path, tmp_path: Path, command: RunCommand
) -> None:
    folder = _copy(made(), tmp_path)
    tensors = load_file(folder / SHARD)
    tensors["other"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    wrong = _wrong(command("verify", folder, "--against", dense, "--json", "-q"))
    assert wrong.keys() == {"other", "model.norm.weight", SHARD}


def test_what_is_no_checkpoint_has_exit_code_2(tmp_path: Path, command: RunCommand) -> None:
    assert command("verify", tmp_path / "nothing").code == 2
    sharded = save_tiny(tmp_path / "sharded", "llama-tied", hidden_size=64)
    assert command("convert", sharded, tmp_path / "sparse", "--force", "-q").code == 0
    assert (tmp_path / "sparse" / INDEX).exists()
    tricked = change_index(tmp_path / "sparse", {"model.norm.weight": "../sharded/model.safetensors"})
    for arguments in (("verify", tricked), ("convert", tricked, tmp_path / "out", "--format", "dense")):
        refused = command(*arguments)
        assert refused.code == 2
        assert "outside the folder" in refused.stderr
