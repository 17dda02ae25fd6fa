"""What goes wrong with text."""


class CalibrationError(Exception):
    """The text cannot be used; the message is one sentence naming the source, what was expected and what to do."""
