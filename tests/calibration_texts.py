"""Tokenizers and texts that the tests of `calibration` share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from calibration.errors import CalibrationError
from calibration.rows import Document
from calibration.sources import Role, documents, parse_source
from calibration.tokens import TokenSet, load_tokens

ROOT = Path(__file__).parent.parent
BOS, EOS = 256, 257
CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"


def byte_tokenizer(*, bos: bool = False, eos: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: the id of an ASCII character is its code; `bos` puts one before every text."""
    vocabulary = {_spelling(byte): byte for byte in range(256)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = cast("Any", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.decoder = cast("Any", decoders.ByteLevel())
    if bos:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        tokenizer.post_processor = cast("Any", template)
    special = {"eos_token": "</s>"} if eos else {}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=16, **special)
    made.chat_template = CHAT if chat else None
    return made


def _spelling(byte: int) -> str:
    """How byte-level vocabularies write a byte: printable Latin-1 as it is, the others counted from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in plain]
    return chr(byte) if byte in plain else chr(0x100 + others.index(byte))


def replace_hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., object]) -> None:
    """Let `load_dataset` answer for the hub; offline, nobody asks first whether the real one is there."""
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def load(
    given: str | Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    role: Role = "calibration",
    **options: Any,
) -> TokenSet:
    """Windows of `given`, 3 of 8 tokens unless said otherwise."""
    asked: dict[str, Any] = {"samples": None, "seq_len": None, "default_samples": 3, "default_seq_len": 8, "seed": 0}
    return load_tokens(parse_source(str(given)), cast("Any", tokenizer), role=role, **{**asked, **options})


def as_text(ids: torch.Tensor) -> str:
    """ASCII back from byte ids, BOS as ^ and EOS as $."""
    return "".join({BOS: "^", EOS: "$"}.get(value) or chr(value) for value in ids.flatten().tolist())


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


def drawn_rows(tokens: Path, samples: int) -> TokenSet:
    """The rows of 24 ids that a run with seed 0 takes from a token file."""
    return load_tokens(
        parse_source(str(tokens)),
        None,
        role="calibration",
        samples=None,
        seq_len=None,
        default_samples=samples,
        default_seq_len=24,
        seed=0,
    )
