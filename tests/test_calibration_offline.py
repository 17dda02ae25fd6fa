"""Files are read without a network, without a cache and without a word."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.calibration_texts import ROOT, read, write_lines
from tests.forked import run_program


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_reading_files_asks_nobody_on_the_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"a.jsonl": '{"text": "one"}', "a.csv": "text,n\none,1\n"}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    if name in contents:
        (tmp_path / name).write_text(contents[name])
    asked: list[object] = []

    def no_such_host(*arguments: object, **_: object) -> None:
        asked.append(arguments[0])
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    assert read(tmp_path / name) == ["one"]
    assert asked == [], "datasets counts its uses, with seconds of waiting where no answer comes"


@pytest.mark.parametrize("offline", ["HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"])
def test_reading_files_prints_nothing_and_needs_no_network(offline: str, tmp_path: Path) -> None:
    rows = [{"text": f"{number}", "n": number} for number in range(3000)]
    write_lines(tmp_path / "a.jsonl", *rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("text,n\nx,1\n")
    write_lines(tmp_path / "d.jsonl", {"text": "a"})
    with (tmp_path / "d.jsonl").open("ab") as stream:
        stream.write(b'{"text": \xff}')
    code = (
        "import sys, itertools, warnings\nwarnings.simplefilter('error')\n"
        "from calibration.errors import CalibrationError\n"
        "from calibration.sources import documents, parse_source\n"
        "for name, rows in (('a.jsonl', 2), ('b.parquet', 2), ('c.csv', 2), ('d.jsonl', 2)):\n"
        "    try: print(list(itertools.islice(documents(parse_source(name), 'calibration'), rows)))\n"
        "    except CalibrationError: print('refused')\n"
    )
    home = Path("/proc/read-only") if Path("/proc").exists() else tmp_path / "home"
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), offline: "1"}
    done = run_program(code, cwd=tmp_path, env=settings)
    assert done.stdout.splitlines() == ["['0', '1']", "['0', '1']", "['x']", "refused"]
    assert (done.stderr, done.returncode) == ("", 0)
    assert not home.exists() or [path for path in home.rglob("*") if path.is_file()] == []
