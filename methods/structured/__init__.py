"""Structured pruning: which units (channels, heads, blocks, experts) go, and how the rest makes up for them."""

import importlib

from methods.structured._method import StructuredMethod

_METHODS = ("depth", "width", "experts")


def structured_names() -> tuple[str, ...]:
    """The methods whose output is a smaller dense model; the other files here are parts of them."""
    return _METHODS


def load_structured(name: str) -> StructuredMethod:
    """Import the method called `name`; raises KeyError for a name that is not in `structured_names()`."""
    if name not in _METHODS:
        raise KeyError(name)
    method = importlib.import_module(f"methods.structured.{name}").METHOD
    assert isinstance(method, StructuredMethod)
    return method
