"""The one kind of failure that a user sees without a traceback."""


class PruneError(Exception):
    """The run failed; the message is one sentence that names what, what was expected and what to do."""

    exit_code = 1


class RequestError(PruneError):
    """The request was wrong: an option, a path, or a checkpoint that cannot be used as it is."""

    exit_code = 2


_LONGEST = 300


def one_line(error: BaseException) -> str:
    """What a library's exception says, fit to stand inside one of our sentences."""
    text = " ".join(str(error).split()).rstrip(".")
    named = f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text
    return named if len(named) <= _LONGEST else named[:_LONGEST] + "..."
