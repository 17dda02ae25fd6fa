"""The papers' protocols, against what their authors' code does with the same rows; no network: the hub is replaced."""

from __future__ import annotations

from typing import Any

import pytest

from calibration.errors import CalibrationError
from calibration.sources import Role
from tests.calibration_texts import BOS, as_text, byte_tokenizer, load, replace_hub

PLAIN, WITH_BOS = byte_tokenizer(), byte_tokenizer(bos=True)
C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}


class Hub:
    """Stands in for `datasets.load_dataset`: gives the same rows to everyone and records the questions."""

    def __init__(self, column: str, *texts: str) -> None:
        self.rows = [{column: text} for text in texts]
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, path: str, name: str | None = None, **options: Any) -> list[dict[str, str]]:
        self.calls.append((path, name, options))
        return self.rows


def stand_in(monkeypatch: pytest.MonkeyPatch, column: str, *texts: str) -> Hub:
    hub = Hub(column, *texts)
    replace_hub(monkeypatch, hub)
    return hub


@pytest.mark.parametrize(
    ("name", "column", "role", "text", "call"),
    [
        (
            "wikitext2",
            "text",
            "evaluation",
            "one two\n\n\n\nthree four",
            ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"}),
        ),
        (
            "ptb",
            "sentence",
            "evaluation",
            "one two  three four",
            ("ptb-text-only/ptb_text_only", None, {"split": "test", "revision": "refs/convert/parquet"}),
        ),
        (
            "c4",
            "text",
            "evaluation",
            "one two  three four",
            ("allenai/c4", None, {"data_files": C4_VALIDATION, "split": "validation"}),
        ),
    ],
)
def test_evaluation_is_one_string_in_consecutive_windows(
    name: str, column: str, role: Role, text: str, call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = stand_in(monkeypatch, column, "one two", "", "three four")
    tokens = load(name, PLAIN, role, default_seq_len=8)
    assert hub.calls == [call]
    assert [as_text(window) for window in tokens.ids] == [text[:8], text[8:16]]
    assert (tokens.seed, tokens.available_tokens) == (None, len(text))
    with_bos = load(name, WITH_BOS, role, default_seq_len=8)
    assert [as_text(window) for window in with_bos.ids] == [
        f"^{text[start : start + 7]}" for start in range(0, len(text) - 6, 7)
    ], "before every window"
    published = load(f"{name}:paper", WITH_BOS, role, default_seq_len=8)
    assert [as_text(window) for window in published.ids] == [f"^{text[:7]}", text[7:15]], "one BOS, before the text"
    how = (
        "the papers' protocol: the text tokenised as one string with the tokenizer's own special tokens, "
        "cut into consecutive windows, the remainder dropped"
    )
    assert tokens.protocol == f"{how}, with windows which begin with the text itself, without a BOS"
    assert with_bos.protocol == f"{how}, with windows each after <s>, which the tokenizer puts before a text"
    assert published.protocol == f"{how}, whose windows begin where they are cut, without a BOS of their own"


@pytest.mark.parametrize(
    ("name", "column", "call"),
    [
        ("wikitext2", "text", ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train"})),
        (
            "ptb",
            "sentence",
            ("ptb-text-only/ptb_text_only", None, {"split": "train", "revision": "refs/convert/parquet"}),
        ),
    ],
)
def test_calibration_windows_start_anywhere_in_one_string(
    name: str, column: str, call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = stand_in(monkeypatch, column, "abcdefghij", "klmnopqrst", "uvwxyz")
    text = "^abcdefghij klmnopqrst uvwxyz"
    tokens = load(f"{name}:paper", WITH_BOS, samples=400, seq_len=8, seed=5)
    assert hub.calls == [call]
    starts = [text.index(as_text(window)) for window in tokens.ids]
    assert set(starts) == set(range(len(text) - 7)), "every start, and only where a window fits"
    assert (tokens.seed, tokens.available_tokens) == (5, len(text))
    assert tokens.sha256 == load(f"{name}:paper", WITH_BOS, samples=400, seq_len=8, seed=5).sha256
    assert tokens.sha256 != load(f"{name}:paper", WITH_BOS, samples=400, seq_len=8, seed=6).sha256
    after_bos = [as_text(window) for window in load(name, WITH_BOS, samples=400, seq_len=8, seed=5).ids]
    assert {text.index(window[1:]) for window in after_bos} == set(range(1, len(text) - 6))
    assert {(window[0], len(window)) for window in after_bos} == {("^", 8)}


def test_c4_calibrates_on_one_window_of_each_long_document(monkeypatch: pytest.MonkeyPatch) -> None:
    long = [f"{letter}0123456789{letter}" for letter in "abcdef"]
    hub = stand_in(monkeypatch, "text", *long, "short", "x" * 8)
    tokens = load("c4", PLAIN, samples=6, seq_len=8, seed=3)
    assert hub.calls == [("allenai/c4", None, {"data_files": C4_TRAIN, "split": "train"})]
    windows = [as_text(window) for window in tokens.ids]
    origins = [next((index for index, text in enumerate(long) if window in text), None) for window in windows]
    assert None not in origins, "no window from a document of 8 tokens or fewer, none across documents"
    assert (tokens.ids.shape, tokens.seed) == ((6, 8), 3)
    assert load("c4", PLAIN, samples=6, seq_len=8, seed=3).sha256 == tokens.sha256
    drawn = {as_text(load("c4", PLAIN, samples=1, seq_len=8, seed=seed).ids) for seed in range(30)}
    assert len({window.strip("0123456789") for window in drawn}) > 3, "documents are picked at random"
    assert all(row[0] == "^" for row in map(as_text, load("c4", WITH_BOS, samples=6, seq_len=8).ids))
    with pytest.raises(CalibrationError, match="c4 has only 6 documents longer than 8 tokens, but 7 are needed"):
        load("c4", PLAIN, samples=7, seq_len=8)


def test_c4_evaluates_on_the_first_documents_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "text", *(["ab"] * 1100), "never")
    text = " ".join(["ab"] * 1100)
    whole = load("c4", PLAIN, "evaluation", seq_len=100)
    assert [as_text(window) for window in whole.ids] == [text[start : start + 100] for start in range(0, 3200, 100)]
    assert whole.available_tokens == len(text)
    first = load("c4", PLAIN, "evaluation", seq_len=4)
    assert (first.ids.shape, first.available_tokens) == ((256, 4), 1024)
    after_bos = load("c4", WITH_BOS, "evaluation", seq_len=4)
    assert (after_bos.ids.shape, set(after_bos.ids[:, 0].tolist())) == ((256, 4), {BOS})
    with pytest.raises(CalibrationError, match="--seq-len 1 leaves no room for c4 after the BOS of each window"):
        load("c4", WITH_BOS, seq_len=1)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")

    replace_hub(monkeypatch, unreachable)
    with pytest.raises(CalibrationError) as caught:
        load("wikitext2", PLAIN)
    assert str(caught.value) == (
        "Salesforce/wikitext could not be fetched (Couldn't reach 'Salesforce/wikitext' on the Hub): "
        "check the name and the network; builtin and local files need no network."
    )
