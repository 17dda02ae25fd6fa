"""What Typer refuses, told as all else: the option, what was given, what it must be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

# Typer has words of pydantic for a value that is no number.
_PREFIX = "Input should be "


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Where an option or argument within is missing, it tells what it is for; where a value is unfit, what it was."""
    try:
        yield
    except typer.BadParameter as error:
        sentence = _missing(error) if type(error) is not typer.BadParameter else _unfit(error)
        if sentence is None:
            raise
        usage_error: Any = typer.BadParameter.__base__  # says its message and no more
        raise usage_error(sentence, error.ctx) from error


def _missing(error: typer.BadParameter) -> str | None:
    parameter: Any = error.param
    if parameter is None:
        return None
    meant = getattr(parameter, "help", None)
    return f"{_name(parameter)} is missing" + (f": {meant}" if meant else ".")


def _unfit(error: typer.BadParameter) -> str | None:
    """None where nothing tells what was typed."""
    beneath: Any = error.__cause__
    if error.param is None or not hasattr(beneath, "errors") or not error.message.startswith(_PREFIX):
        return None
    wanted = error.message.removeprefix(_PREFIX).partition(",")[0]
    return f"{_name(error.param)} is {str(beneath.errors()[0]['input'])!r}, but must be {wanted}."


def _name(parameter: Any) -> str:
    name = parameter.opts[0]
    return name if name.startswith("-") else (parameter.metavar or name.upper())
