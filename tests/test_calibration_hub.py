"""Data sets on the hub, streamed: `datasets.load_dataset` is replaced, or the real one meets no hub."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calibration.errors import CalibrationError
from calibration.sources import documents, parse_source
from tests.calibration_texts import ROOT, read, refusal, replace_hub, write_lines
from tests.forked import run_program


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
        ("hf:owner/name:en:test:title", "en", "test", ["a", "b"]),
        ("hf:owner/name::test:title", None, "test", ["a", "b"]),
        ("hf:owner/name:::title", None, "train", ["a", "b"]),
        ("hf:owner/name::train[:10]x", None, "train[", None),
    ],
)
def test_hub_sources_stream(
    given: str, config: str | None, split: str, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub([{"title": "a", "text": "t1"}, {"title": "b", "text": "t2"}])
    replace_hub(monkeypatch, hub)
    if expected is None:
        assert refusal(given) == f"{given} has no column '10]x': use one of title, text."
    else:
        assert read(given) == expected
    assert hub.calls == [(given.split(":")[1], config, {"split": split, "streaming": True})]


@pytest.mark.parametrize(
    ("given", "full"), [("hf:owner/name", "hf:owner/name::train:"), ("hf:name:en:test", "hf:name:en:test:")]
)
def test_the_column_is_the_last_of_four_parts(given: str, full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_hub(monkeypatch, Hub([{"title": "a", "story": "t1", "n": 1}]))
    assert (
        refusal(given) == f"{given} has the columns title, story, n: name the one with the text, such as {full}title."
    )
    assert read(f"{full}story") == ["t1"]


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it\nat all"), RuntimeError("gone."), OSError()])
def test_the_hub_may_fail_in_the_midst_of_reading(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_hub(monkeypatch, Hub([{"text": "t1"}], error))
    found = documents(parse_source("hf:owner/name"), "calibration")
    assert next(found) == "t1"
    reason = (str(error) or "OSError").splitlines()[0].rstrip(".")
    expected = f"owner/name could not be fetched ({reason}): check the name and the network; builtin and local files"
    with pytest.raises(CalibrationError, match=f"^{re.escape(expected)} need no network.$"):
        next(found)


def test_the_hub_may_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    replace_hub(monkeypatch, unreachable)
    assert refusal("hf:owner/name") == (
        "owner/name could not be fetched (Couldn't reach 'owner/name' on the Hub): "
        "check the name and the network; builtin and local files need no network."
    )


def closed_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize("source", ["hf:owner/name", "wikitext2"])
def test_no_hub_is_told_at_once(source: str, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{closed_port()}"
    stdout, stderr, seconds = load_in_new_process(source, tmp_path, HF_ENDPOINT=endpoint)
    repo = {"wikitext2": "Salesforce/wikitext"}.get(source, "owner/name")
    assert stdout == (
        f"{repo} could not be fetched ({endpoint} does not answer: Connection refused): check the network, or set "
        "HF_HUB_OFFLINE=1 if it was fetched before; builtin and local files need no network.\n"
    )
    assert stderr == ""
    assert seconds < 15, "datasets itself tries for 23 seconds, after the imports"


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline(offline: str, tmp_path: Path) -> None:
    stdout, stderr, _ = load_in_new_process("hf:owner/name", tmp_path, **{offline: "1"})
    assert re.fullmatch(
        r"owner/name could not be fetched \(Couldn't reach 'owner/name' .*\): check the name .*\n", stdout
    )
    assert stderr == ""


def load_in_new_process(source: str, home: Path, **settings: str) -> tuple[str, str, float]:
    """What the real `datasets` leads to: stdout (the error), stderr and seconds."""
    code = (
        "import sys; from calibration.errors import CalibrationError; from tests.calibration_texts import *\n"
        "try: load(sys.argv[1], byte_tokenizer())\n"
        "except CalibrationError as error: print(error)\n"
    )
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
    }
    started = time.monotonic()
    done = run_program(code, source, cwd=ROOT, env={**clean, "HF_HOME": str(home), **settings})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, time.monotonic() - started


@pytest.mark.parametrize("proxy", ["http_proxy", "all_proxy"])
def test_a_proxy_is_left_to_answer_for_itself(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_hub(monkeypatch, Hub([{"text": "t1"}]))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv(proxy, "http://proxy.example:3128")
    assert read("hf:owner/name") == ["t1"]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "does not answer: Connection refused" in refusal("hf:owner/name")


def test_what_lies_around_is_not_taken_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([{"text": "from the hub"}])
    replace_hub(monkeypatch, hub)
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rows.jsonl", {"text": "local"})
    assert refusal("hf:json") == "json is a format, no data set on the hub: write hf:OWNER/NAME, or a file's path."
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert refusal("hf:owner/name") == (
        "There is a folder owner/name here, which hides the data set of that name on the hub: "
        "run from another folder, or give ./owner/name to read the folder."
    )
    assert hub.calls == []
    assert read("hf:owner/other") == ["from the hub"]


def test_without_datasets_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("hf:owner/name") == (
        "Reading owner/name needs the package datasets: pip install 'prune-cli[data]', or use builtin "
        "or a plain text file."
    )
