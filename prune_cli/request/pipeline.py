"""What is done to each linear layer: a method, then the steps that follow it, each with its options. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from methods import load_method, method_names
from methods._method import Method, Step
from methods.steps import load_step, step_names
from methods.structured import structured_names
from prune_cli.errors import RequestError, did_you_mean
from prune_cli.request.options import parse_options


@dataclass(frozen=True)
class StepOfPipeline:
    name: str
    step: Step
    options: Any


@dataclass(frozen=True)
class Pipeline:
    """A method and the steps after it, in their order."""

    name: str
    method: Method
    options: Any
    steps: tuple[StepOfPipeline, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """All statistics that the method and its steps read; empty if no text is needed."""
        own = self.method.needs_with(self.options)
        return tuple(dict.fromkeys((*own, *(need for step in self.steps for need in step.step.needs))))

    @property
    def follows_targets(self) -> bool:
        """Whether --target dense makes a difference: whatever reads a Gram matrix works towards outputs."""
        return "gram" in self.needs

    @property
    def new_values(self) -> bool:
        """Whether kept weights get other values than in the dense model."""
        last = self.steps[-1].step.changes if self.steps else ("weights" if self.method.solves else "mask")
        return last == "weights"

    def __str__(self) -> str:
        return " + ".join((self.name, *(step.name for step in self.steps)))

    def options_as_json(self) -> dict[str, Any]:
        """Every option with its value; those of a step carry its name."""
        steps = {
            f"{step.name}.{key}": value
            for step in self.steps
            for key, value in dataclasses.asdict(step.options).items()
        }
        return {**dataclasses.asdict(self.options), **steps}


def make_pipeline(method: str, refine: str | None, *, reconstruct: bool, options: Mapping[str, Any]) -> Pipeline:
    """Raises RequestError for an unknown name, an option that nobody has, or steps that undo each other."""
    found = find_method(method)
    names = ([refine] if refine is not None else []) + (["reconstruct"] if reconstruct else [])
    if refine is not None and refine not in refinement_names():
        raise RequestError(
            f"--refine is {refine!r}: choose one of {', '.join(refinement_names())}"
            f"{did_you_mean(refine, refinement_names())}."
        )
    if refine is not None and found.solves and not reconstruct:
        raise RequestError(
            f"--refine {refine} gives kept weights their dense values back, which undoes what {method} solved for: "
            "add --reconstruct, or use --method wanda."
        )
    for key in options:
        step = key.partition(".")[0] if "." in key else None
        if step is not None and step not in names:
            there = f"this run has {', '.join(names)}" if names else "this run has none (--refine, --reconstruct)"
            raise RequestError(f"The option {key!r} names the step {step!r}: {there}.")
    own = {key: value for key, value in options.items() if "." not in key}
    steps = []
    for name in names:
        given = {key.partition(".")[2]: value for key, value in options.items() if key.startswith(f"{name}.")}
        step = load_step(name)
        steps.append(StepOfPipeline(name, step, parse_options(f"the step {name}", step.options, given)))
    return Pipeline(method, found, parse_options(f"the method {method}", found.options, own), tuple(steps))


def find_method(name: str) -> Method:
    """The method called `name`; raises RequestError with the names there are."""
    try:
        return load_method(name)
    except KeyError:
        raise RequestError(
            f"There is no method {name!r}: choose one of {', '.join((*method_names(), *structured_names()))}"
            f"{did_you_mean(name, (*method_names(), *structured_names()))}."
        ) from None


def refinement_names() -> tuple[str, ...]:
    """The steps that --refine takes."""
    return tuple(name for name in step_names() if load_step(name).changes == "mask")
