"""Greedy continuations against plain transformers, and where they are shown."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import RunCommand
from tests.tiny import load_plain, save_tiny

PROMPTS = ("ab", "a longer prompt")


@cache
def opened(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), load_plain(folder)


@torch.no_grad()
def naive(folder: Path, prompt: str, tokens: int) -> str:
    """The likeliest token after everything so far, one by one, on the whole model."""
    tokenizer, model = opened(folder)
    ids = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    new: list[int] = []
    while len(new) < tokens:
        new.append(int(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            new.pop()
            break
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama-untied", "gpt2"])
def test_continuations_are_those_of_the_whole_models(kind: str, tmp_path: Path, command: RunCommand) -> None:
    dense = save_tiny(tmp_path / "dense", kind)
    prune = ("prune", dense, tmp_path / "out", "-m", "magnitude", "-s", "0.7", "--generate", 4, "--json")
    report = command(*prune).json
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    both = ("compare", tmp_path / "out", dense, "--tokens")
    found = command(*both, 4, "--prompts", tmp_path / "prompts.txt", "--json").json["continuations"]
    assert [each["prompt"] for each in found] == list(PROMPTS)
    for each in found:
        assert each["dense"] == naive(dense, each["prompt"], 4)
        assert each["pruned"] == naive(tmp_path / "out", each["prompt"], 4)
    assert len(report["continuations"]) == 3
    for each in report["continuations"]:
        assert each["pruned"] == naive(tmp_path / "out", each["prompt"], 4)
    pages = [(tmp_path / "out" / name).read_text() for name in ("prune_report.md", "README.md", "prune_report.html")]
    assert all("What it says" in page and "of the city begins with" in page for page in pages)
    shown = command(*both, 2, "--prompt", "ab").stdout
    assert "ab  (the same for " in shown or "ab  (the same to the end)" in shown
    assert "- dense: `" in command(*both, 2, "-p", "ab", "--markdown").stdout


def test_a_chat_template_is_used_where_there_is_one(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    chat = save_tiny(tmp_path / "chat", "llama-untied")
    (chat / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    found = command("compare", chat, llama, "--tokens", 3, "-p", "ab", "--json").json["continuations"]
    plain = command("compare", llama, llama, "--tokens", 3, "-p", "ab!", "--json").json["continuations"]
    assert found[0]["dense"] == plain[0]["dense"]
    assert (plain[0]["same"], plain[0]["dense"]) == (plain[0]["tokens"], plain[0]["pruned"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tokens", "0"), "--tokens is 0, but must be 1 to 4096."),
        (("--tokens", "4000"), "but the model takes 64 positions."),
        (("--prompts", "nowhere.txt"), "--prompts nowhere.txt cannot be read"),
        (("--prompts", "nowhere.txt", "-p", "a"), "exclude each other"),
    ],
)
def test_what_cannot_be_continued_is_told(
    arguments: tuple[str, ...], told: str, llama: Path, command: RunCommand
) -> None:
    refused = command("compare", llama, llama, *arguments)
    assert refused.code == 2
    assert told in " ".join(refused.stderr.split())
