"""`prune-cli convert`, end to end: exact both ways, small, atomic, resumable, strict."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from os import close, pwrite
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.read_sparse import read_file
from prune_cli.checkpoint.file_names import partial_folder
from prune_cli.errors import PruneError
from prune_cli.progress import Silent
from prune_cli.sparse import convert as sparse_convert
from prune_cli.sparse import encode_shard as shards
from prune_cli.sparse.convert import JOURNAL
from prune_cli.sparse.encode_shard import Written, make_dense
from prune_cli.sparse.format import open_shard
from prune_cli.sparse.parallel_files import each_file
from tests.broken import INDEX, change_config
from tests.conftest import RunCommand, folder_bytes
from tests.forked import ForkedRun
from tests.sparse_files import sparse_file, zeroed
from tests.tiny import save_tiny

DEMO = Path(__file__).parent.parent / "examples" / "demo-model"


OTHER_FORMATS = ["model.onnx_data", "model.tflite", "pytorch_model.bin", "tf_model.h5.index.json"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded tied model with zeros, a report, other files, and weights in another format."""
    folder = save_tiny(tmp_path_factory.mktemp("sparse") / "model", "llama-tied", dtype=torch.bfloat16, hidden_size=64)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("kept")
    for name in OTHER_FORMATS:
        (folder / name).write_bytes(b"weights")
    return zeroed(folder)


def test_sparse_and_back_gives_the_same_files(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    done = command("convert", pruned, sparse, "--json", "-q")
    assert done.code == 0
    assert done.json["bytes_after"] < 0.7 * done.json["bytes_before"]
    assert done.json["encoded_tensors"] == 22
    assert done.json["not_copied"] == OTHER_FORMATS
    before = {name: data for name, data in folder_bytes(pruned).items() if name not in OTHER_FORMATS}
    after = folder_bytes(sparse)
    assert set(after) == set(before)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"config.json", *(name for name in before if name.endswith(".safetensors"))}
    back = command("convert", sparse, dense, "--format", "dense")
    assert back.code == 0
    assert "22 of 29 tensors decoded" in back.stdout
    assert folder_bytes(dense) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


def test_a_model_without_zeros_is_not_made_larger(whole: Path, tmp_path: Path, command: RunCommand) -> None:
    refused = command("convert", whole, tmp_path / "out", "-q")
    assert refused.code == 2
    assert "has too few zeros for sparse files: they would take " in refused.stderr
    assert list(tmp_path.iterdir()) == []
    forced = command("convert", whole, tmp_path / "out", "--force", "--json").json
    assert forced["bytes_after"] > forced["bytes_before"]


def test_files_sent_to_the_disk_while_they_are_written(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    assert command("convert", pruned, tmp_path / "expected", "-q").code == 0
    synced: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_SYNC_BYTES", 1)
        patch.setattr("os.fdatasync", synced.append)
        assert command("convert", pruned, tmp_path / "sparse", "-q").code == 0
    assert len(synced) == 29 + len(list(pruned.glob("*.safetensors")))
    assert folder_bytes(tmp_path / "sparse") == folder_bytes(tmp_path / "expected")


def test_after_an_error_no_thread_writes_on(pruned: Path, tmp_path: Path) -> None:
    """The file's descriptor is closed and its number may stand for another file."""
    source = min(pruned.glob("*.safetensors"), key=lambda path: -path.stat().st_size)
    shard = open_shard(sparse_file(source, tmp_path / "sparse.safetensors"))
    first = max(shard.dense_entries.values(), key=lambda entry: entry.nbytes)
    tensors = dict(shard.tensors) | {first.name: replace(shard.tensors[first.name], crc32=0)}
    written: list[str] = []

    def write(*given: Any) -> int:
        time.sleep(0.005)
        written.append("piece")
        return pwrite(*given)

    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.close", lambda descriptor: (written.append("closed"), close(descriptor)))
        patch.setattr("os.pwrite", write)
        with pytest.raises(PruneError, match=f"{first.name} in .* is damaged: its checksum"):
            make_dense(replace(shard, tensors=tensors), tmp_path / "dense.safetensors", pool, lambda: None)
    assert written.count("closed") == 1
    assert written[-1] == "closed"


def test_the_numpy_reader_reads_what_convert_writes(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    assert command("convert", pruned, tmp_path / "sparse", "-q").code == 0
    for path in sorted((tmp_path / "sparse").glob("*.safetensors")):
        shard, dense = open_shard(path), (pruned / path.name).read_bytes()
        for name, (_, _, data) in read_file(path).items():
            entry = shard.dense_entries[name]
            assert data == dense[entry.begin : entry.end]


@pytest.mark.parametrize(
    ("asked", "most"),
    [(["-s", 0.5], 9.05), (["-s", 0.7], 5.85), (["--pattern", "2:4"], 8.8)],
    ids=["50%", "70%", "2:4"],
)
def test_pruned_weights_take_few_bits(asked: list[object], most: float, tmp_path: Path, command: RunCommand) -> None:
    """All bits of the file that the pruned tensors of a real model take, headers included."""
    assert command("prune", DEMO, tmp_path / "dense", "-m", "magnitude", *asked, "-q").code == 0
    assert command("convert", tmp_path / "dense", tmp_path / "sparse", "-q").code == 0
    report = json.loads((tmp_path / "dense" / "prune_report.json").read_text())
    names = [tensor["name"] for tensor in report["tensors"] if tensor["action"] == "pruned"]
    shard = open_shard(tmp_path / "sparse" / "model.safetensors")
    pruned = [shard.tensors[name] for name in names]
    stored = sum(part.nbytes for t in pruned for part in t.parts)
    assert {t.encoding for t in pruned} == {asked[1] if asked[0] == "--pattern" else "bitmask"}
    assert 8 * stored / sum(t.count for t in pruned) <= most
    saved = (tmp_path / "dense" / "model.safetensors").stat().st_size - shard.path.stat().st_size
    assert saved > sum(2 * t.count for t in pruned) - stored - 16_384
    assert command("convert", tmp_path / "dense", tmp_path / "deflated", "--compress", "-q").code == 0
    deflated = open_shard(tmp_path / "deflated" / "model.safetensors")
    assert sum(part.nbytes for name in names for part in deflated.tensors[name].parts) < 0.7 * stored
    assert command("convert", tmp_path / "deflated", tmp_path / "again", "--format", "dense", "-q").code == 0
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "dense")


def test_killed_then_resumed_gives_the_same_bytes(tmp_path: Path, command: RunCommand) -> None:
    model = zeroed(save_tiny(tmp_path / "model", "llama-untied", hidden_size=256, intermediate_size=1024))
    assert command("convert", model, tmp_path / "expected", "-q").code == 0
    out = tmp_path / "out"
    process = ForkedRun("convert", model, out, "-q")
    journal = partial_folder(out) / JOURNAL
    while process.poll() is None and not (journal.exists() and '"file":' in journal.read_text()):
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not out.exists():  # else it was faster than the kill
        refused = command("convert", model, out, "-q")
        assert refused.code == 2
        assert "add --resume" in refused.stderr
        other = command("convert", tmp_path / "expected", out, "-q", "--resume", "--format", "dense")
        assert other.code == 2
        assert "converted something else" in other.stderr
        assert command("convert", model, out, "-q", "--resume").code == 0
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")
    assert not partial_folder(out).exists()


def test_done_files_are_not_written_again(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    assert command("convert", pruned, tmp_path / "expected", "-q").code == 0
    out = tmp_path / "out"
    arguments = ("convert", pruned, out, "-q")
    files = sorted(pruned.glob("*.safetensors"))
    last = files[-1]
    journal, original = partial_folder(out) / JOURNAL, sparse_convert.make_sparse

    def stops_at_the_last(source: Path, *rest: Any, **options: Any) -> Written:
        if source.name == last.name:
            while journal.read_text().count('"file":') < len(files) - 1:
                time.sleep(0.001)
            raise OSError(28, "No space left on device")
        return original(source, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_convert, "make_sparse", stops_at_the_last)
        assert command(*arguments).code == 1
    written = {path.name: path.stat().st_mtime_ns for path in partial_folder(out).glob("*.safetensors")}
    assert command(*arguments, "--resume").code == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert {name for name in after if after[name] != written.get(name)} == {last.name}
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")


def test_an_error_in_one_file_stops_the_other_at_its_next_tensor() -> None:
    begun: list[str] = []

    def work(file: str, pool: Executor, done: Callable[[], None]) -> Written:
        begun.append(file)
        if file == "bad":
            raise PruneError("no")
        for _ in range(10_000):
            time.sleep(0.001)
            done()
        raise AssertionError

    with pytest.raises(PruneError, match="no"):
        list(each_file(["good", "bad", "other", "never"], work, Silent()))
    assert "never" not in begun


def test_what_cannot_be_converted_is_refused(pruned: Path, tmp_path: Path, command: RunCommand) -> None:
    def refused(*arguments: object) -> str:
        outcome = command("convert", *arguments, "-q")
        assert outcome.code == 2, outcome
        assert outcome.stderr.count("\n") == 1
        return outcome.stderr

    sparse = tmp_path / "sparse"
    assert command("convert", pruned, sparse, "-q").code == 0
    assert "exists already" in refused(pruned, sparse)
    assert "is sparse already" in refused(sparse, tmp_path / "a")
    assert "is dense already" in refused(pruned, tmp_path / "a", "--format", "dense")
    assert "dense files are never compressed" in refused(sparse, tmp_path / "a", "--format", "dense", "--compress")
    assert "choose dense or sparse" in refused(pruned, tmp_path / "a", "--format", "zip")
    quantised = change_config(shutil.copytree(pruned, tmp_path / "fp8"), quantization_config={"quant_method": "fp8"})
    assert "(fp8) already" in refused(quantised, tmp_path / "a")
    mixed = shutil.copytree(sparse, tmp_path / "mixed")
    name = json.loads((mixed / INDEX).read_text())["weight_map"]["model.norm.weight"]
    shutil.copyfile(pruned / name, mixed / name)
    assert f"({name} is dense)" in refused(mixed, tmp_path / "a", "--format", "dense")
    assert not (tmp_path / "a").exists()
    assert not partial_folder(tmp_path / "a").exists()


@pytest.mark.parametrize("form", [[], ["--compress", "--self-contained"]], ids=["sparse", "deflated"])
def test_eval_and_inspect_decode(
    form: list[str], pruned: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    sparse = tmp_path / "sparse"
    assert command("convert", pruned, sparse, *form, "-q").code == 0
    figures = [command("eval", folder, "--data", tokens_file, "--json", "-q").json for folder in (pruned, sparse)]
    assert figures[0]["evaluation"] == figures[1]["evaluation"]
    beside = command("eval", sparse, "--against", pruned, "--data", tokens_file, "--json", "-q").json["comparison"]
    assert (beside["kl_from_dense"], beside["top1_agreement"]) == (0, 1)
    dense, found = (command("inspect", folder, "--json").json for folder in (pruned, sparse))
    shards = {path.name: open_shard(path) for path in sparse.glob("*.safetensors")}
    for was, tensor in zip(dense["tensors"], found["tensors"], strict=True):
        stored = shards[tensor["file"]].tensors[tensor["name"]]
        assert was == {**tensor, "bytes": was["bytes"], "encoding": None}
        assert tensor["encoding"] == stored.stored_as
        assert tensor["bytes"] == sum(part.nbytes for part in stored.parts)
    shown = command("inspect", sparse).stdout
    assert ("bitmask+deflate" if form else "bitmask") in shown
    assert "stored as" not in command("inspect", pruned).stdout


def test_what_overwrites_tensors_in_their_files_refuses_sparse_ones(
    pruned: Path, tmp_path: Path, command: RunCommand
) -> None:
    sparse = tmp_path / "sparse"
    assert command("convert", pruned, sparse, "-q").code == 0
    for arguments in (
        ("prune", sparse, tmp_path / "out", "-m", "magnitude"),
        ("prune", sparse, tmp_path / "out", "-m", "depth"),
        ("soup", pruned, sparse, tmp_path / "out"),
    ):
        refused = command(*arguments)
        assert refused.code == 2
        assert "is stored sparse: prune-cli convert it with --format dense first." in refused.stderr


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', '{\n  "a": {}\n}\n\n', "{}", '{"b":[1],\r\n"c":2 }'])
def test_config_comes_back_to_the_byte(text: str) -> None:
    from prune_cli.sparse.config import is_ours, with_entry, without_entry

    sparse = with_entry(text, Path("config.json"))
    assert is_ours(json.loads(sparse))
    assert without_entry(sparse, Path("config.json")) == text
    written_anew = json.dumps(json.loads(sparse), sort_keys=True)
    assert json.loads(without_entry(written_anew, Path("config.json"))) == json.loads(text)
