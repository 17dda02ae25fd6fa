"""The one kind of failure that a user sees without a traceback."""

import difflib
from collections.abc import Iterable


class PruneError(Exception):
    """The run failed; the message is one sentence that names what, what was expected and what to do."""

    exit_code = 1


class RequestError(PruneError):
    """The request was wrong: an option, a path, or a checkpoint that cannot be used as it is."""

    exit_code = 2


class LostRankError(PruneError):
    """Another process of the run is gone or hangs."""


class EndedElsewhereError(PruneError):
    """Another process of the run has ended it, and tells why."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question for the end of a sentence about an unknown name, empty where nothing known is like it."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


_LONGEST = 300


def one_line(error: BaseException) -> str:
    """What a library's exception says, fit to stand inside one of our sentences."""
    text = " ".join(str(error).split()).rstrip(".")
    named = f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text
    return named if len(named) <= _LONGEST else named[:_LONGEST] + "..."
