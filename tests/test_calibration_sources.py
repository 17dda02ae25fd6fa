"""What a user may type as SOURCE, and the documents that come of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import save_file

from calibration import builtin
from calibration.builtin import builtin_documents
from calibration.builtin_python import python_documents
from calibration.errors import CalibrationError
from calibration.rows import Document
from calibration.sources import Role, documents, parse_source
from tests.calibration_texts import ROOT, read, refusal, write_lines


def test_checking_a_source_imports_neither_torch_nor_datasets() -> None:
    code = "import sys, calibration.sources; print(sorted({'torch', 'datasets', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("documents_of", [builtin_documents, python_documents])
def test_builtin_splits_share_no_document(documents_of: Callable[[str], Iterator[str]]) -> None:
    train, test = set(documents_of("train")), set(documents_of("test"))
    assert len(train) > len(test) > 20
    assert {text for text in train & test if len(text) > 300} == set(), "short files may happen to be the same"
    assert min(map(len, train | test)) > 0


def test_builtin_follows_the_role_unless_a_split_is_named() -> None:
    def first(given: str, role: Role) -> list[Document]:
        return list(islice(documents(parse_source(given), role), 3))

    train, test = list(islice(builtin_documents("train"), 3)), list(islice(builtin_documents("test"), 3))
    assert train != test
    assert first("builtin", "calibration") == first("builtin:train", "evaluation") == train
    assert first("builtin", "evaluation") == first("builtin:test", "calibration") == test
    ours = list(islice(python_documents("test"), 3))
    assert first("builtin:python", "evaluation") == first("builtin:python:test", "calibration") == ours
    assert first("builtin:python:train", "evaluation") == first("builtin:python", "calibration") != ours
    with pytest.raises(CalibrationError, match="There is no text 'builtin:perl'"):
        parse_source("builtin:perl")


def test_builtin_is_the_text_of_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine has the same, and no other: a new text is a new version, with figures made anew."""
    packed = (ROOT / "calibration/builtin.jsonl.gz").read_bytes()
    text = gzip.decompress(packed)
    assert hashlib.sha256(text).hexdigest() == builtin.SHA256
    assert 1_000_000 < len(text) <= 2_000_000
    documents = [json.loads(line) for line in text.splitlines()]
    assert len({document["name"] for document in documents}) == len(documents)
    prose = [document["name"].startswith(("devil/", "jargon/")) for document in documents]
    assert 0.3 < sum(len(d["text"]) for d, is_prose in zip(documents, prose, strict=True) if is_prose) / len(text) < 0.7
    assert sum(a != b for a, b in pairwise(prose)) > len(prose) / 3, "prose and code alternate"
    monkeypatch.setattr(builtin, "SHA256", "0" * 64)
    builtin._unpacked.cache_clear()
    with pytest.raises(
        CalibrationError, match=r"builtin\.jsonl\.gz is not the text of this version: install prune-cli"
    ):
        next(builtin_documents("test"))


def test_the_sources_of_builtin_are_told() -> None:
    lines = gzip.decompress((ROOT / "calibration/builtin.jsonl.gz").read_bytes()).splitlines()
    told = (ROOT / "calibration/SOURCES.md").read_text()
    for part in {json.loads(line)["name"].partition("/")[0] for line in lines}:
        assert f"`{part}" in told
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert package_data["calibration"] == ["builtin.jsonl.gz", "SOURCES.md"]


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb"])
def test_a_paper_name_is_not_shadowed_by_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("mine")
    assert parse_source(name).kind == "paper"
    assert read(f"./{name}") == ["mine"]
    with pytest.raises(ValueError, match="not made of documents"):
        next(documents(parse_source(name), "calibration"))


@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.py", "README", "d.TEXT"])
def test_any_other_suffix_is_one_document_of_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("Grüße\n\nzwei\n", encoding="utf-8")
    assert read(path) == ["Grüße\n\nzwei\n"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.NDJSON", "a [1] *?.jsonl", "u:v.jsonl"])
def test_json_lines(name: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / name, {"id": "1", "text": "one"}, {"id": "2", "text": None}, {"id": "3", "text": "é"})
    assert read(path) == ["one", "é"]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "a [1].jsonl", "{a,b}.jsonl", "a#1?x=2.jsonl", "a!b c%20.jsonl", "~.jsonl"]
)
def test_relative_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "d [x]*"
    folder.mkdir()
    write_lines(folder / name, {"text": "one"})
    monkeypatch.chdir(folder)
    assert read(f"./{name}") == read(".") == read(f"../d [x]*/{name}") == ["one"]
    monkeypatch.chdir(tmp_path)
    assert read(f"d [x]*/{name}") == ["one"]


def test_a_path_that_looks_like_an_address(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a::b.jsonl", {"text": "one"})
    assert refusal(path) == f"{path} has :: in its path, which `datasets` takes for an address: rename or move it."


def test_json_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"content": "a", "n": 1}, {"content": "b", "n": 2}]')
    assert read(path) == ["a", "b"]


def test_csv_and_tsv_keep_text_that_looks_missing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('n,text\n1,"x, y\nz"\n2,NA\n3,\n')
    (tmp_path / "rows.tsv").write_text("n\tstory\n1\tx, y\n2\tnull\n")
    assert read(tmp_path / "rows.csv") == ["x, y\nz", "NA"]
    assert read(tmp_path / "rows.tsv") == ["x, y", "null"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"n": [1, 2], "body": ["a", "b"]}).to_parquet(path)
    assert read(path) == ["a", "b"]


def test_messages_come_before_text(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write_lines(tmp_path / "chat.jsonl", {"text": "flat", "messages": chat}, {"text": "flat", "messages": []})
    assert read(path) == [chat]
    assert read(f"{path}:text") == ["flat", "flat"]


def test_column_is_named_after_the_path(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"title": "t", "story": "s"})
    assert read(f"{path}:story") == ["s"]
    assert read(f"{tmp_path}:title") == ["t"]
    assert refusal(path) == (f"{path} has the columns title, story: name the one with the text, such as {path}:title.")
    assert refusal(f"{path}:body") == f"{path} has no column 'body': use one of title, story."


def test_a_file_that_exists_with_the_colon_wins(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", {"text": "column"})
    (tmp_path / "rows.jsonl:text").write_text("whole name")
    assert read(tmp_path / "rows.jsonl:text") == ["whole name"]


def test_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "x.txt").write_text("second")
    write_lines(tmp_path / "c.jsonl", {"text": "third"}, {"text": "fourth"})
    (tmp_path / "a.md").write_text("first")
    (tmp_path / ".hidden" / "x.txt").write_text("unseen")
    (tmp_path / ".note").write_text("unseen")
    (tmp_path / "weights.bin").write_text("unseen")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\0\0")
    save_file({"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    assert read(tmp_path) == ["first", "second", "third", "fourth"]


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("x")
    assert refusal(tmp_path) == f"The folder {tmp_path} holds no text, JSONL, CSV or Parquet file: give one that does."


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".pickle", ".bin", ".npy", ".PT"])
def test_pickles_are_refused_before_reading(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"ids{suffix}"
    path.write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"never a pickle .* save a \.safetensors file with an integer tensor"):
        parse_source(str(path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": "b",\n', "JSON parse error"),
        ("latin.jsonl", '{"text": "é"}\n'.encode("latin-1"), "utf-8"),
        ("numbers.jsonl", b"1\n2\n", "JSON parse error"),
        ("bad.csv", b'a,text\n1,"x', "EOF inside string"),
        ("bad.parquet", b"garbage", "Parquet file size is 7 bytes"),
    ],
)
def test_malformed_files_are_named(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    kind = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}[path.suffix]
    assert message.startswith(f"{path} cannot be read as {kind} (")
    assert reason in message
    assert message.endswith(f"): mend the file, or name it .txt if it is no {kind}.")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_an_empty_file_has_no_documents(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert read(tmp_path / name) == []


def test_a_column_of_numbers_is_not_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "a"}, {"text": 3})
    assert refusal(f"{path}:text") == (
        f"Row 2 of {path} holds int in column 'text', but text or chat messages are expected: "
        f"mend the row or name another column, as {path}:COLUMN."
    )


def test_text_that_does_not_decode(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode("latin-1"))
    assert refusal(path).startswith(f"{path} is not UTF-8 text (")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, text in {"a.txt": "one", "b.jsonl": '{"text": "one"}', "c.csv": "text,n\none,1\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read(tmp_path) == ["one", "one", "one"]


def test_columns_of_a_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    assert refusal(f"{path}:text") == f"{path} has no columns, so leave out :text."


@pytest.mark.parametrize(
    ("given", "hint"),
    [("owner/name", True), ("no/such.jsonl", True), ("nothing", False), ("./owner/name", False), ("a/b/c", False)],
)
def test_unknown_sources_list_the_forms(given: str, hint: bool) -> None:
    message = refusal(given)
    assert message.startswith(f"There is no text {given!r}: give builtin, c4, wikitext2, ptb, hf:REPO")
    assert (f"write hf:{given}." in message) is hint


def test_an_empty_source_is_not_the_current_folder() -> None:
    assert refusal(" ").startswith("No text is named: give builtin")


@pytest.mark.parametrize("given", ["a" * 5000, "~nobody-of-that-name/x.txt"])
def test_names_that_the_system_refuses(given: str) -> None:
    message = refusal(given)
    assert re.match(r"^'.{4,125}' cannot be opened \([^()]+\): give builtin, c4", message)
    assert len(message) < 500


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no such device")
def test_what_is_no_regular_file() -> None:
    assert refusal("/dev/null") == "/dev/null is no regular file: save the text to one and give its path."


@pytest.mark.parametrize("given", ["hf:", "hf:a/b/c", "hf:../x", "hf:a:b:c:d:e"])
def test_malformed_hub_sources(given: str) -> None:
    assert refusal(given).startswith(f"{given!r} is not of the form hf:REPO[:CONFIG][:SPLIT][:COLUMN]")


def test_without_datasets_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = write_lines(tmp_path / "rows.jsonl", {"text": "a"})
    assert refusal(path) == (
        f"Reading {path} needs the package datasets: pip install 'prune-cli[data]', or use builtin "
        "or a plain text file."
    )
    (tmp_path / "a.txt").write_text("plain text needs it not")
    assert read(tmp_path / "a.txt") == ["plain text needs it not"]
