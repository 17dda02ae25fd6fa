"""Chats as the tokens that the tokenizer's own chat template makes of them."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from calibration.errors import CalibrationError
from calibration.rows import Chat
from calibration.token_set import Tokenizer

_PROBE = "tokens"
# A template that knows no parts prints them as a list.
_PRINTED = re.compile("['\"]type['\"]")


class ChatTokens:
    """Tokenises the chats of one source, which sentences call `where`."""

    def __init__(self, tokenizer: Tokenizer, where: str) -> None:
        self._tokenizer = tokenizer
        self._where = where

    def ids(self, chat: Chat) -> list[int]:
        """What `apply_chat_template(tokenize=True)` gives. Raises CalibrationError for a chat that cannot be read."""
        if not self._tokenizer.chat_template:
            raise CalibrationError(
                f"{self._where} holds chats, but the tokenizer has no chat template: use plain text, or an instruct "
                "model."
            )
        messages = [self._message(message) for message in chat]
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        except Exception as error:
            # The template is a program that came with the model: it may raise anything over a chat it does not expect.
            raise CalibrationError(
                f"{self._where} holds a chat that the tokenizer's chat template refuses ({error}): leave it out or "
                "mend it."
            ) from error

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        if not message.get("role"):
            raise CalibrationError(
                f"{self._where} holds a chat with a message without a role: give role and content to each."
            )
        # The reader of rows fills keys that other rows have with None, which templates take for values.
        given = {key: _without_none(value) for key, value in message.items() if value is not None or key == "content"}
        content = given.get("content")
        if content is None:
            return given
        if isinstance(content, str):
            return given if self._takes_text else {**given, "content": [{"type": "text", "text": content}]}
        parts = [{"type": "text", "text": self._text_of(part)} for part in self._parts(content)]
        return {**given, "content": parts if self._takes_parts else "".join(part["text"] for part in parts)}

    def _parts(self, content: Any) -> list[Any]:
        if not isinstance(content, list):
            raise CalibrationError(
                f"{self._where} holds a chat whose content is of type {type(content).__name__}: give text, or a list "
                'of parts {"type": "text", "text": "..."}.'
            )
        return content

    def _text_of(self, part: Any) -> str:
        if not isinstance(part, dict) or not part.get("type"):
            raise CalibrationError(
                f"{self._where} holds a chat with a part that does not say what it is: write it as "
                '{"type": "text", "text": "..."}.'
            )
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            what = "text without its text" if part["type"] == "text" else part["type"]
            raise CalibrationError(
                f"{self._where} holds a chat with a part of type {what}, but only text can be read: leave the chat out."
            )
        return part["text"]

    @cached_property
    def _takes_parts(self) -> bool:
        shown = self._shown([{"type": "text", "text": _PROBE}])
        return _PROBE in shown and not _PRINTED.search(shown)

    @cached_property
    def _takes_text(self) -> bool:
        """True but of templates for parts alone, which print nothing of a text."""
        return _PROBE in self._shown(_PROBE) or not self._takes_parts

    def _shown(self, content: Any) -> str:
        """What the template makes of `content`; empty where it refuses it."""
        try:
            return self._tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # noqa: BLE001
            return ""


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
