"""What the dense and the pruned model say after the same prompts: shown alike in terminal, Markdown, page and card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from prune_cli.request.json_schema import Keywords

Count = Annotated[int, Keywords(minimum=0)]
HOW = "Both models continue the same prompts, each with its likeliest token."


@dataclass(frozen=True)
class Continuation:
    """One prompt and what each model said next; `same` of the first `tokens` are equal, the dense model's number."""

    prompt: str
    dense: str
    pruned: str
    same: Count
    tokens: Count


def agreement(each: Continuation) -> str:
    """How far the two go together, in words."""
    if each.same == each.tokens and each.dense == each.pruned:
        return "the same to the end"
    return f"the same for {each.same} of {each.tokens} tokens"


def one_line(text: str) -> str:
    """With line breaks shown, so that code stays readable in a table."""
    return text.replace("\r", "").replace("\n", "⏎").strip(" ")


def rows_of(found: Sequence[Continuation]) -> list[tuple[str, ...]]:
    """Prompt, what each model says, how far they go together."""
    return [(one_line(each.prompt), one_line(each.dense), one_line(each.pruned), agreement(each)) for each in found]


def as_markdown(found: Sequence[Continuation]) -> str:
    """A section, empty where nothing was generated."""
    if not found:
        return ""
    parts = [
        f"- **{_plain(each.prompt)}** ({agreement(each)})\n"
        f"  - dense: {_plain(each.dense)}\n  - pruned: {_plain(each.pruned)}"
        for each in found
    ]
    return f"## What it says\n\n{HOW}\n\n" + "\n".join(parts)


def _plain(text: str) -> str:
    """As inline code, which Markdown leaves as it is; a fence longer than any run of backticks in it."""
    shown = one_line(text) or " "
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in shown).split()), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}" if longest else f"{fence}{shown}{fence}"
