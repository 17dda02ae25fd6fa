"""What may follow a method: steps that improve its mask, or the weights that it kept. The file name is the step's."""

import importlib
import pkgutil

from methods._method import Step


def step_names() -> tuple[str, ...]:
    """The names of all steps, read from the folder without importing them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load_step(name: str) -> Step:
    """Import the step called `name`; raises KeyError for a name that is not in `step_names()`."""
    if name not in step_names():
        raise KeyError(name)
    step = importlib.import_module(f"methods.steps.{name}").STEP
    assert isinstance(step, Step)
    return step
