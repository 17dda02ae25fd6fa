"""Pruning methods: pure tensor maths. The file name is the method's name; files starting with `_` are shared parts."""

import importlib
import pkgutil
from functools import cache

from methods._method import Method


@cache
def method_names() -> tuple[str, ...]:
    """The names of all methods, read from the folder without importing them."""
    modules = (module for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return tuple(sorted(module.name for module in modules if not module.name.startswith("_")))


def load_method(name: str) -> Method:
    """Import the method called `name`; raises KeyError for a name that is not in `method_names()`."""
    if name not in method_names():
        raise KeyError(name)
    method = importlib.import_module(f"methods.{name}").METHOD
    assert isinstance(method, Method)
    return method
