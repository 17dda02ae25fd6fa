"""Windows of tokens from text of any kind. Ids are ASCII codes, so windows are read as text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.builtin import builtin_documents
from calibration.errors import CalibrationError
from calibration.sources import Role
from calibration.tokens import TokenSet
from tests.calibration_texts import BOS, EOS, as_text, byte_tokenizer, load

PLAIN = byte_tokenizer()
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def text_file(folder: Path, text: str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def rows(tokens: TokenSet) -> list[str]:
    return [as_text(window) for window in tokens.ids]


def test_evaluation_is_the_whole_text_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = load(text_file(tmp_path, ALPHABET), PLAIN, "evaluation")
    assert rows(tokens) == [ALPHABET[start : start + 8] for start in range(0, 56, 8)]
    assert (tokens.ids.dtype, tokens.seed, tokens.available_tokens, tokens.warnings) == (torch.int64, None, 62, ())
    assert tokens.protocol == (
        "documents in order, tokenised without special tokens and packed, with EOS between documents, "
        "cut into consecutive windows, which begin with the text itself, without a BOS, the remainder dropped"
    )
    assert caplog.text == ""


def test_evaluation_of_a_text_equals_its_tokenisation(tmp_path: Path) -> None:
    text = "Grüße, 世界\n\n" * 20
    tokens = load(text_file(tmp_path, text), PLAIN, "evaluation")
    whole = PLAIN(text, add_special_tokens=False)["input_ids"]
    assert tokens.ids.flatten().tolist() == whole[: len(whole) // 8 * 8]
    assert tokens.available_tokens == len(whole) == len(text.encode())


def test_samples_limit_an_evaluation_to_the_first_windows(tmp_path: Path) -> None:
    path = text_file(tmp_path, ALPHABET)
    assert rows(load(path, PLAIN, "evaluation", samples=2)) == ["abcdefgh", "ijklmnop"]
    with pytest.raises(CalibrationError, match=r"has 62 tokens, but 8 samples of 8 need 64: .* at most --samples 7"):
        load(path, PLAIN, "evaluation", samples=8)


def test_documents_are_joined_by_eos_and_empty_ones_leave_no_trace(tmp_path: Path) -> None:
    for name, text in {"a": "one", "b": "", "c": "two", "d": "three"}.items():
        text_file(tmp_path, text, name)
    assert rows(load(tmp_path, PLAIN, "evaluation")) == ["one$two$"]
    assert rows(load(tmp_path, byte_tokenizer(eos=False), "evaluation")) == ["onetwoth"]
    assert "EOS" not in load(tmp_path, byte_tokenizer(eos=False), "evaluation").protocol


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("ab\n é", max_size=12), min_size=1, max_size=6), length=st.integers(2, 9), bos=st.booleans()
)
def test_packing_equals_a_naive_loop(tmp_path: Path, texts: list[str], length: int, bos: bool) -> None:
    path = text_file(tmp_path, "".join(json.dumps({"text": text}) + "\n" for text in texts), "rows.jsonl")
    stream: list[int] = []
    for text in texts:
        if text:
            stream += [*([EOS] if stream else []), *text.encode()]
    step = length - 1 if bos else length
    starts = range(0, len(stream) - step + 1, step)
    windows = [[*([BOS] if bos else []), *stream[start : start + step]] for start in starts]
    if not windows:
        with pytest.raises(CalibrationError, match=f"has {len(stream)} tokens, too few for one window of {length}"):
            load(path, byte_tokenizer(bos=bos), "evaluation", seq_len=length)
        return
    tokens = load(path, byte_tokenizer(bos=bos), "evaluation", seq_len=length)
    assert (tokens.ids.tolist(), tokens.available_tokens) == (windows, len(stream))


def test_a_window_of_nothing_but_bos(tmp_path: Path) -> None:
    path = text_file(tmp_path, ALPHABET)
    with pytest.raises(CalibrationError, match=r"--seq-len 1 leaves no room .* after the BOS .*: ask for 2 or more\.$"):
        load(path, byte_tokenizer(bos=True), seq_len=1)
    assert load(path, PLAIN, samples=1, seq_len=1).ids.shape == (1, 1)


def test_a_tokenizer_that_starts_with_bos_gets_it_in_every_window(tmp_path: Path) -> None:
    path, bos = text_file(tmp_path, ALPHABET), byte_tokenizer(bos=True)
    tokens = load(path, bos, "evaluation")
    assert rows(tokens)[:2] == ["^abcdefg", "^hijklmn"]
    assert tokens.ids.shape == (8, 8)
    assert "windows, each after <s>, which the tokenizer puts before a text, the" in tokens.protocol
    drawn = load(path, bos, samples=8)
    assert sorted(row[0] for row in rows(drawn)) == ["^"] * 8
    assert all(row[1:] in ALPHABET for row in rows(drawn))
    with pytest.raises(CalibrationError, match="62 tokens, but 9 samples of 7 need 63"):
        load(path, bos, samples=9)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(2, 12), samples=st.integers(1, 30), seed=st.integers(0, 2**63 - 1))
def test_calibration_draws_windows_that_do_not_overlap(tmp_path: Path, length: int, samples: int, seed: int) -> None:
    path = text_file(tmp_path, ALPHABET)
    whole = len(ALPHABET) // length
    if samples > whole:
        with pytest.raises(CalibrationError, match=f"need {samples * length}: .* at most --samples {whole}"):
            load(path, PLAIN, samples=samples, seq_len=length, seed=seed)
        return
    tokens = load(path, PLAIN, samples=samples, seq_len=length, seed=seed)
    again = load(path, PLAIN, samples=samples, seq_len=length, seed=seed)
    assert tokens.ids.shape == (samples, length)
    assert (tokens.sha256, tokens.seed) == (again.sha256, seed)
    # Every character stands once in the text: windows are pieces of it, and none shares a character with another.
    assert all(row in ALPHABET for row in rows(tokens))
    assert len(set("".join(rows(tokens)))) == samples * length


def test_the_draw_is_pinned(tmp_path: Path) -> None:
    # Written down from a run: whoever must change it changes every user's masks, which belongs in the CHANGELOG.
    tokens = load(text_file(tmp_path, ALPHABET), PLAIN, seed=1)
    assert rows(tokens) == ["yzABCDEF", "ijklmnop", "OPQRSTUV"]
    assert tokens.sha256 == hashlib.sha256(b"(3, 8)" + tokens.ids.numpy().astype("<i8").tobytes()).hexdigest()
    assert tokens.sha256 == "c01b741c0086e371e55bc502eff0fae13db6af7b42398d46cd91c8a44a3265f1"


def test_documents_are_shuffled_by_the_seed_and_no_more_are_read_than_needed(tmp_path: Path) -> None:
    for letter in ALPHABET:
        text_file(tmp_path, letter * 40, f"{ord(letter)}.txt")
    one, two = (load(tmp_path, PLAIN, seed=seed) for seed in (1, 2))
    # Four times 3 x 8 tokens are wanted, and 41 x 3 - 1 is the first whole number of documents that has them.
    assert one.available_tokens == two.available_tokens == 122
    assert set(as_text(one.ids)) != set(as_text(two.ids))


def test_long_texts_are_drawn_from_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.packing._LONG_DOCUMENT", 100)
    lines = [f"{number:06d}\n" for number in range(1000)]
    path = text_file(tmp_path, "".join(lines))
    tokens = load(path, PLAIN, samples=1, seq_len=98)
    assert tokens.available_tokens == 4 * 98 + 3, "four pieces of whole lines, joined by EOS"
    assert load(path, PLAIN, "evaluation", seq_len=7).ids.shape == (1000, 7)
    starts = {rows(load(path, PLAIN, samples=1, seq_len=98, seed=seed))[0][:6] for seed in range(5)}
    assert len(starts) == 5


def test_of_endless_text_only_the_beginning_is_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.packing._MOST_CHARACTERS_SHUFFLED", 1000)
    monkeypatch.setattr("calibration.packing._LONG_DOCUMENT", 100)
    path = text_file(tmp_path, "".join(f"{number:06d}\n" for number in range(1000)))
    for seed in range(5):
        places = [int(row[:6]) for row in rows(load(path, PLAIN, samples=1, seq_len=98, seed=seed)) if row[6] == "\n"]
        assert all(place < 150 for place in places), "eleven pieces of fourteen lines"
    # The rest is read if the beginning does not do.
    assert len(set(rows(load(path, PLAIN, samples=50, seq_len=98)))) == 50


@given(text=st.text(alphabet="ab\n", max_size=60), size=st.integers(1, 10))
def test_pieces_make_up_the_text(text: str, size: int) -> None:
    from calibration import packing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_LONG_DOCUMENT", size)
        pieces = [piece for piece in packing._pieces(text) if isinstance(piece, str)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= size


def test_fewer_samples_with_a_warning_if_none_were_asked_for(tmp_path: Path) -> None:
    path = text_file(tmp_path, ALPHABET[:20])
    tokens = load(path, PLAIN)
    assert tokens.ids.shape == (2, 8)
    assert tokens.warnings == (f"{path} gives 2 samples of 8 tokens, not 3.",)


@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_a_shorter_window_with_a_warning_if_no_length_was_asked_for(role: Role, tmp_path: Path) -> None:
    path = text_file(tmp_path, ALPHABET[:9])
    tokens = load(path, PLAIN, role, default_seq_len=2048)
    assert rows(tokens) == [ALPHABET[:9]]
    assert tokens.warnings == (f"{path} has only 9 tokens: its one window is 9 tokens long, not 2048.",)
    with pytest.raises(CalibrationError, match="has 9 tokens, too few for one window of 10"):
        load(path, PLAIN, role, seq_len=10)


@pytest.mark.parametrize("text", ["", "1234567"])
def test_hardly_any_text_is_refused(text: str, tmp_path: Path) -> None:
    path = text_file(tmp_path, text)
    with pytest.raises(CalibrationError, match=f"has {len(text)} tokens, too few for one window of 8: give more text"):
        load(path, PLAIN)


def chat_file(folder: Path, *messages: dict[str, str]) -> Path:
    return text_file(folder, json.dumps({"messages": messages}) + "\n", "chat.jsonl")


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    path = chat_file(tmp_path, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})
    assert rows(load(path, byte_tokenizer(chat=True), "evaluation")) == ["<user>hi", "\n<assist"]
    with pytest.raises(CalibrationError, match=r"chat\.jsonl holds chats, but the tokenizer has no chat template"):
        load(path, PLAIN)


def test_chats_that_do_not_fit_the_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = chat_file(tmp_path, {"role": "user", "content": "hi"})
    with pytest.raises(CalibrationError, match=r"chat template refuses \(roles must alternate\)"):
        load(path, tokenizer)
    path = chat_file(tmp_path, {"from": "human", "value": "hi"})
    with pytest.raises(CalibrationError, match="a message without a role"):
        load(path, byte_tokenizer(chat=True))


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"folder has no tokenizer, .* give a \.safetensors file with input_ids"):
        load(text_file(tmp_path, ALPHABET))


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    path = text_file(tmp_path, "abcdefgz")
    assert load(path, PLAIN, "evaluation", vocab_size=ord("z") + 1).ids.max() == ord("z")
    with pytest.raises(CalibrationError, match="gives the token 122, but the model knows 0 to 121: use a tokenizer"):
        load(path, PLAIN, "evaluation", vocab_size=ord("z"))


def test_builtin_text_gives_different_windows_to_each_seed_and_role() -> None:
    drawn = [load("builtin", PLAIN, samples=4, seq_len=64, seed=seed) for seed in (0, 0, 1)]
    assert [tokens.ids.shape for tokens in drawn] == [(4, 64)] * 3
    assert drawn[0].sha256 == drawn[1].sha256 != drawn[2].sha256
    held_out = load("builtin", PLAIN, "evaluation", samples=2, seq_len=64)
    first = next(builtin_documents("test")).encode()[:128]
    assert held_out.ids.flatten().tolist() == list(first)
