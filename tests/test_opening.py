"""What stands first in windows, and chats: as the tokenizer and its chat template have it, and never twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from calibration.chats import ChatTokens
from calibration.errors import CalibrationError
from tests.calibration_texts import BOS, CHAT, EOS, as_text, byte_tokenizer, load, write_lines

PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}\n{% endfor %}"
)
PARTS_ALONE = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}|{% endfor %}"
HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def templated(template: str, *, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(bos=bos)
    tokenizer.chat_template = template
    return tokenizer


def rows(given: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[str]:
    return [as_text(window) for window in load(given, tokenizer, "evaluation", **options).ids]


def test_a_bos_that_only_the_chat_template_writes_stands_before_every_window(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnopqrstu")
    tokenizer = templated("{{ bos_token }}" + CHAT)
    assert rows(path, tokenizer) == ["^abcdefg", "^hijklmn", "^opqrstu"]
    told = load(path, tokenizer, "evaluation").protocol
    assert "windows, each after <s>, with which the chat template begins, the remainder dropped" in told
    drawn = load(path, tokenizer, samples=3)
    assert sorted(as_text(row) for row in drawn.ids) == ["^abcdefg", "^hijklmn", "^opqrstu"]
    ends_too = templated("{{ bos_token }}" + CHAT + "{{ bos_token }}")  # one token for both, as of GPT-2
    assert rows(path, ends_too) == ["^abcdefg", "^hijklmn", "^opqrstu"]


def test_what_begins_each_message_is_no_bos(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnop")
    each = "{% for m in messages %}{{ bos_token }}{{ m.role }}{{ m.content }}{% endfor %}"
    for template in (each, "{{ raise_exception('only three messages') }}", CHAT):
        assert rows(path, templated(template)) == ["abcdefgh", "ijklmnop"]


def test_all_that_a_tokenizer_puts_before_a_text_stands_before_every_window(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    both = processors.TemplateProcessing(single="</s> <s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = cast("Any", both)
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijkl")
    assert rows(path, tokenizer) == ["$^abcdef", "$^ghijkl"]


@pytest.mark.parametrize("by_tokenizer", [True, False])
def test_chats_are_what_the_template_gives_and_have_one_bos(by_tokenizer: bool, tmp_path: Path) -> None:
    tokenizer = templated("{{ bos_token }}" + CHAT, bos=by_tokenizer)
    path = write_lines(tmp_path / "chats.jsonl", {"messages": [HI, YO]}, {"messages": [YO, HI]})
    first, second = (tokenizer.apply_chat_template(chat, return_dict=False) for chat in ([HI, YO], [YO, HI]))
    assert first[0] == second[0] == BOS
    whole = load(path, tokenizer, "evaluation", samples=1, seq_len=len(first)).ids[0].tolist()
    assert whole == first
    # The second window begins with the EOS between the chats, and so after a BOS of its own; the third's is the chat's.
    assert rows(path, tokenizer, seq_len=len(first))[1] == "^$" + as_text(torch.tensor(second))[: len(first) - 2]
    assert rows(path, tokenizer, seq_len=len(first) + 2)[:1] == [as_text(torch.tensor([*first, EOS, BOS]))]


def test_a_window_that_meets_a_bos_has_no_second(tmp_path: Path) -> None:
    """Text that was written with its special tokens is read as them."""
    path = tmp_path / "text.txt"
    path.write_text("<s>abcdefg<s>hijklmnopqrst</s>")
    tokenizer = byte_tokenizer(bos=True)
    assert rows(path, tokenizer) == ["^abcdefg", "^hijklmn", "^opqrst$"]
    drawn = load(path, tokenizer, samples=3, seed=4)
    assert sorted(as_text(row) for row in drawn.ids) == ["^abcdefg", "^hijklmn", "^opqrst$"]


def test_an_eos_that_a_text_has_is_not_doubled(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "abc</s>"}, {"text": "defg"})
    assert rows(path, byte_tokenizer()) == ["abc$defg"]


def test_stored_rows_without_what_the_tokenizer_begins_with_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.tensor([[BOS, 97, 98], [97, 98, 99]])}, path)
    tokens = load(path, byte_tokenizer(bos=True))
    assert len(tokens.warnings) == 1
    assert "has 1 rows (of 2) that do not begin as texts of this model do (each after <s>, which" in tokens.warnings[0]
    assert load(path, byte_tokenizer()).warnings == load(path).warnings == ()


TWO = [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize("template", [CHAT, PARTS, PARTS_ALONE])
def test_content_in_parts_is_read_as_the_template_takes_it(template: str, tmp_path: Path) -> None:
    tokenizer = templated(template)
    taken = [{**HI, "content": TWO if template != CHAT else " one two"}]
    expected = tokenizer.apply_chat_template(taken, return_dict=False)
    path = write_lines(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": TWO}]})
    found = load(path, tokenizer, "evaluation", seq_len=len(expected)).ids
    assert found.tolist() == [expected]


def test_text_for_a_template_of_parts_alone() -> None:
    assert as_text(torch.tensor(ChatTokens(cast("Any", templated(PARTS_ALONE)), "x").ids([HI, YO]))) == "hi|yo|"


def test_keys_that_other_messages_have_are_not_there(tmp_path: Path) -> None:
    """The reader of JSON fills them with None, which is no call of a tool."""
    template = "{% for m in messages %}{{ 'T' if 'calls' in m else m.content }}{% endfor %}"
    chat = [HI, {"role": "assistant", "content": "", "calls": [{"name": "f", "a": 1}]}, {**YO, "content": "longer"}]
    path = write_lines(tmp_path / "chats.jsonl", {"messages": chat})
    assert rows(path, templated(template), seq_len=9) == ["hiTlonger"]


REFUSED: dict[str, tuple[Any, str]] = {
    "an image": (
        [{"type": "image", "url": "a.png"}],
        "a part of type image, but only text can be read: leave",
    ),
    "no text": ([{"type": "text", "url": "a"}], "a part of type text without its text, but only text can be read"),
    "strings": (["hi"], r'a part that does not say what it is: write it as \{"type": "text", "text": "\.\.\."\}'),
    "a number": (5, "a chat whose content is of type int: give text, or a list of parts"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_content_that_is_no_text_is_refused_in_one_sentence(content: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=f"^chats.jsonl holds .*{message}") as caught:
        ChatTokens(cast("Any", templated(PARTS)), "chats.jsonl").ids([{"role": "user", "content": content}])
    assert "\n" not in str(caught.value)
