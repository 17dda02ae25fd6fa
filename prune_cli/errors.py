"""The one kind of failure that a user sees without a traceback."""


class PruneError(Exception):
    """The run failed; the message is one sentence that names what, what was expected and what to do."""

    exit_code = 1


class RequestError(PruneError):
    """The request was wrong: an option, a path, or a checkpoint that cannot be used as it is."""

    exit_code = 2
