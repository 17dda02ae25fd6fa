"""What stands before a text: the special tokens that a tokenizer, or its chat template, begins every text with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibration.token_set import Tokenizer, tokenise

_CHAT = [{"role": "user", "content": "first words"}, {"role": "assistant", "content": "last words"}]


@dataclass(frozen=True)
class Opening:
    """`ids` come before every text, none for most tokenizers without a BOS; `told` says so in a report."""

    ids: tuple[int, ...] = ()
    told: str = "which begin with the text itself, without a BOS"

    def begins(self, ids: torch.Tensor) -> bool:
        """Whether `ids` (tokens,) begin so themselves; never true of an empty opening."""
        return bool(self.ids) and tuple(ids[: len(self.ids)].tolist()) == self.ids


NO_OPENING = Opening()


def find_opening(tokenizer: Tokenizer) -> Opening:
    """Of the tokenizer or, where it puts nothing before a text, of its chat template: models are lost without it."""
    found = _before_text(tokenizer)
    if found:
        return Opening(found, f"each after {tokenizer.decode(found)}, which the tokenizer puts before a text")
    bos = tokenizer.bos_token_id
    if bos is not None and _before_chat(tokenizer, tokenizer.decode((bos,))):
        return Opening((bos,), f"each after {tokenizer.decode((bos,))}, with which the chat template begins")
    return NO_OPENING


def _before_text(tokenizer: Tokenizer) -> tuple[int, ...]:
    bare, whole = (tokenise(tokenizer, "a", special_tokens=special) for special in (False, True))
    first = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return tuple(whole[:first])


def _before_chat(tokenizer: Tokenizer, bos: str) -> bool:
    """Whether chats begin with `bos` and only they: of some models it is what begins each message."""
    if not tokenizer.chat_template:
        return False
    try:
        shown = tokenizer.apply_chat_template(_CHAT, tokenize=False)
    except Exception:  # noqa: BLE001
        return False  # a template for other chats only: nothing is known of it
    before_answer, found, _ = shown.rpartition(_CHAT[-1]["content"])
    return bool(found) and before_answer.startswith(bos) and before_answer.count(bos) == 1
