"""What a user may type as SOURCE, and the documents that come of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import save_file

from calibration.builtin import builtin_documents
from calibration.errors import CalibrationError
from calibration.rows import Document
from calibration.sources import Role, documents, parse_source

ROOT = Path(__file__).parent.parent


def read(given: str | Path, role: Role = "calibration") -> list[Document]:
    return list(documents(parse_source(str(given)), role))


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(given: str | Path) -> str:
    """The one sentence that refuses a source, at once or while reading."""
    with pytest.raises(CalibrationError) as caught:
        read(given)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_checking_a_source_imports_neither_torch_nor_datasets() -> None:
    code = "import sys, calibration.sources; print(sorted({'torch', 'datasets', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_builtin_follows_the_role_unless_a_split_is_named() -> None:
    def first(given: str, role: Role) -> list[Document]:
        return list(islice(documents(parse_source(given), role), 3))

    train, test = list(islice(builtin_documents("train"), 3)), list(islice(builtin_documents("test"), 3))
    assert train != test
    assert first("builtin", "calibration") == first("builtin:train", "evaluation") == train
    assert first("builtin", "evaluation") == first("builtin:test", "calibration") == test


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
    assert refusal(path) == (
        f"{path} has the columns title, story: name the one with the text by adding :COLUMN to the source, "
        "such as :title."
    )
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
    assert refusal(path).startswith(
        f"Row 2 of {path} holds int in column 'text', but text or chat messages are expected"
    )


def test_text_that_does_not_decode(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode("latin-1"))
    assert refusal(path).startswith(f"{path} is not UTF-8 text (")


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


@pytest.mark.parametrize("given", ["hf:", "hf:a/b/c", "hf:../x", "hf:a:b:c:d:e"])
def test_malformed_hub_sources(given: str) -> None:
    assert refusal(given).startswith(f"{given!r} is not of the form hf:REPO[:CONFIG][:SPLIT][:COLUMN]")


class Hub:
    """Stands in for `datasets.load_dataset`: records how it is called, then gives rows and breaks if told to."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.rows, self.error = rows, error
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, path: str, name: str | None = None, **options: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((path, name, options))
        return self._rows()

    def _rows(self) -> Iterator[dict[str, Any]]:
        yield from self.rows
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("given", "config", "split", "expected"),
    [
        ("hf:owner/name", None, "train", ["t1", "t2"]),
        ("hf:name:en", "en", "train", ["t1", "t2"]),
        ("hf:owner/name::test:title", None, "test", ["a", "b"]),
    ],
)
def test_hub_sources_stream(
    given: str, config: str | None, split: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub([{"title": "a", "text": "t1"}, {"title": "b", "text": "t2"}])
    monkeypatch.setattr("datasets.load_dataset", hub)
    assert read(given) == expected
    assert hub.calls == [(given.split(":")[1], config, {"split": split, "streaming": True})]


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it\nat all"), RuntimeError("gone"), OSError()])
def test_the_hub_may_fail_in_the_midst_of_reading(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", Hub([{"text": "t1"}], error))
    found = documents(parse_source("hf:owner/name"), "calibration")
    assert next(found) == "t1"
    reason = (str(error) or "OSError").splitlines()[0]
    expected = f"owner/name could not be fetched ({reason}): check the name and the network; builtin and local files"
    with pytest.raises(CalibrationError, match=f"^{re.escape(expected)} need no network.$"):
        next(found)


def test_the_hub_may_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert refusal("hf:owner/name") == (
        "owner/name could not be fetched (Couldn't reach 'owner/name' on the Hub): "
        "check the name and the network; builtin and local files need no network."
    )


def test_without_datasets_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = write_lines(tmp_path / "rows.jsonl", {"text": "a"})
    assert refusal(path) == (
        "Reading json needs the package datasets: pip install datasets, or use builtin or a plain text file."
    )
    (tmp_path / "a.txt").write_text("plain text needs it not")
    assert read(tmp_path / "a.txt") == ["plain text needs it not"]
