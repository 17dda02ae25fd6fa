"""`prune --format sparse`: the dense run's bytes in sparse files, also when it was stopped; what is told about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prune_cli.sparse.reencode
from prune_cli.checkpoint.file_names import JOURNAL, partial_folder
from prune_cli.report.schema import report_schema
from prune_cli.sparse.format import is_sparse
from tests.broken import change_config
from tests.conftest import RunCommand, folder_bytes
from tests.tiny import save_tiny

_REPORTS = {"prune_report.json", "prune_report.md", "prune_report.html", "README.md"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    return save_tiny(folder, "llama-tied", dtype=torch.bfloat16, hidden_size=64)


@pytest.fixture
def pair(model: Path, tmp_path: Path, tokens_file: Path, command: RunCommand) -> tuple[Path, Path, list[object]]:
    """A dense and a sparse output of the same request, and its options."""
    options: list[object] = ["--calibration", tokens_file, "-s", 0.6, "-q"]
    assert command("prune", model, tmp_path / "dense", *options).code == 0
    assert command("prune", model, tmp_path / "sparse", *options, "--format", "sparse").code == 0
    return tmp_path / "dense", tmp_path / "sparse", options


def _weights_and_config(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in folder_bytes(folder).items() if name not in _REPORTS}


def _report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prune_report.json").read_text())


def test_decoded_it_is_the_dense_run(
    pair: tuple[Path, Path, list[object]], model: Path, tmp_path: Path, command: RunCommand
) -> None:
    dense, sparse, _ = pair
    assert all(is_sparse(path) for path in sparse.glob("*.safetensors"))
    assert command("convert", sparse, tmp_path / "back", "--format", "dense", "-q").code == 0
    assert _weights_and_config(tmp_path / "back") == _weights_and_config(dense)
    assert command("convert", dense, tmp_path / "converted", "-q").code == 0
    assert _weights_and_config(tmp_path / "converted") == _weights_and_config(sparse)
    loaded, expected = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (sparse, dense))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    for folder in (sparse, tmp_path / "back"):
        sound = command("verify", folder, "--against", model)
        assert sound.code == 0, sound.stdout
        assert command("push", folder, "someone/pruned", "--dry-run", "-q").code == 0
        assert command("check", folder, "--min-sparsity", 0.59, "-q").code == 0


def test_the_report_is_of_the_written_files(pair: tuple[Path, Path, list[object]]) -> None:
    from jsonschema import Draft202012Validator

    dense, sparse = _report(pair[0]), _report(pair[1])
    Draft202012Validator(report_schema()).validate(sparse)
    assert sparse["output"]["dense_files"] == dense["output"]["files"]
    assert sparse["output"]["files"].keys() == dense["output"]["files"].keys()
    written = sum(path.stat().st_size for path in pair[1].glob("*.safetensors"))
    assert sparse["totals"]["bytes_after"] == written
    assert sparse["totals"]["bytes_as_sparse"] is None
    headers = 1000 * len(dense["tensors"])
    assert written - headers < dense["totals"]["bytes_as_sparse"] < written < 0.8 * dense["totals"]["bytes_after"]
    assert "The sparse files take" in sparse["gain"]
    assert "import prune_cli" in (pair[1] / "README.md").read_text()
    assert "import prune_cli" not in (pair[0] / "README.md").read_text()
    assert "With --format sparse, about" in (pair[0] / "prune_report.md").read_text()


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_stopped_while_encoding_it_continues_to_the_same_bytes(
    shard: int, pair: tuple[Path, Path, list[object]], model: Path, tmp_path: Path, command: RunCommand
) -> None:
    out, original = tmp_path / "out", prune_cli.sparse.reencode.make_sparse
    files = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(files) >= 2

    def stops(source: Path, target: Path, *rest: Any) -> object:
        if source.name == files[min(shard, len(files) - 1)]:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(source, target, *rest)

    options = [*pair[2], "--format", "sparse"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune_cli.sparse.reencode, "make_sparse", stops)
        assert command("prune", model, out, *options).code == 1
    assert (partial_folder(out) / JOURNAL).exists()
    other = command("prune", model, out, *pair[2], "--resume")
    assert other.code == 2
    assert "format differ" in other.stderr
    assert command("prune", model, out, *options, "--resume").code == 0
    assert folder_bytes(out) == folder_bytes(pair[1])


def test_self_contained_it_is_what_convert_makes_of_it(
    pair: tuple[Path, Path, list[object]], model: Path, tmp_path: Path, command: RunCommand
) -> None:
    dense, _, options = pair
    assert command("prune", model, tmp_path / "out", *options, "--format", "sparse", "--self-contained").code == 0
    assert command("convert", dense, tmp_path / "converted", "--self-contained", "-q").code == 0
    assert _weights_and_config(tmp_path / "out") == _weights_and_config(tmp_path / "converted")
    assert (tmp_path / "out" / "sparse_loader.py").is_file()
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    assert command("verify", tmp_path / "out", "--against", model, "-q").code == 0


def test_what_cannot_be_stored_sparse_is_refused_before_any_work(
    model: Path, tmp_path: Path, command: RunCommand
) -> None:
    def refused(*arguments: object) -> str:
        outcome = command("prune", *arguments, "--format", "sparse", "-q")
        assert outcome.code == 2, outcome
        return outcome.stderr

    structured = refused(model, tmp_path / "out", "-m", "depth")
    assert "--format sparse is for methods that make weights sparse, and depth removes whole units" in structured
    alone = command("prune", model, tmp_path / "out", "--self-contained")
    assert alone.code == 2
    assert "--self-contained is for --format sparse" in alone.stderr
    own = change_config(shutil.copytree(model, tmp_path / "own"), auto_map={"AutoModel": "mine.Mine"})
    assert "leave out --self-contained" in refused(own, tmp_path / "out", "-m", "magnitude", "--self-contained")
    assert "choose dense or sparse" in command("prune", model, tmp_path / "out", "--format", "zip").stderr
    assert not partial_folder(tmp_path / "out").exists()


def test_the_terminal_tells_both_sizes(model: Path, tmp_path: Path, command: RunCommand) -> None:
    dense = command("prune", model, tmp_path / "dense", "-m", "magnitude", "--pattern", "2:4")
    assert "With --format sparse, about" in dense.stdout
    sparse = command("prune", model, tmp_path / "sparse", "-m", "magnitude", "--pattern", "2:4", "--format", "sparse")
    assert "The sparse files take" in sparse.stdout
    assert "kernels for this pattern" in " ".join(sparse.stdout.split())
    dry = command("prune", model, tmp_path / "dry", "--format", "sparse", "--dry-run")
    assert "Estimated: The sparse files take" in " ".join(dry.stdout.split())
