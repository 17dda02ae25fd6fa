"""Structured pruning: which units (channels, heads, blocks, experts) go, and how the rest makes up for them.

The file name is the method's name; files starting with `_` are shared parts.
"""

import importlib
import pkgutil
from functools import cache

from methods.structured._method import StructuredMethod


@cache
def structured_names() -> tuple[str, ...]:
    """The methods whose output is a smaller dense model, read from the folder without importing them."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def load_structured(name: str) -> StructuredMethod:
    """Import the method called `name`; raises KeyError for a name that is not in `structured_names()`."""
    if name not in structured_names():
        raise KeyError(name)
    method = importlib.import_module(f"methods.structured.{name}").METHOD
    assert isinstance(method, StructuredMethod)
    return method
