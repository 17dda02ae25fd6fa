"""What the inputs of a soup have in common, found before anything is written; each refusal names what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prune_cli.checkpoint.config_file import read_config
from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import Source
from prune_cli.checkpoint.stored_values import broken
from prune_cli.errors import RequestError
from prune_cli.progress import Progress
from prune_cli.soup.average import is_sparse, same_bytes
from prune_cli.soup.request import Masks

# They say how a checkpoint was saved or is run, not what its weights mean.
_CONFIG_IGNORED = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
_SHOWN = 3


@dataclass(frozen=True)
class Ingredient:
    """One input."""

    source: Source
    checkpoint: Checkpoint
    weight: float


@dataclass(frozen=True)
class TensorSurvey:
    """One tensor in all inputs: `zeros` in each, whether it is `sparse` in any and `identical` in all."""

    name: str
    identical: bool
    sparse: bool
    zeros: tuple[int, ...]
    parameters: int


def check_alike(ingredients: Sequence[Ingredient]) -> tuple[str, ...]:
    """Refuse other configs, names, shapes or dtypes; returns warnings about side files that differ."""
    first, *others = ingredients
    config = _comparable_config(first)
    warnings: list[str] = []
    for other in others:
        theirs = _comparable_config(other)
        keys = sorted(key for key in config.keys() | theirs.keys() if config.get(key) != theirs.get(key))
        if keys:
            shown = ", ".join(f"{key}: {config.get(key)!r} and {theirs.get(key)!r}" for key in keys[:_SHOWN])
            raise RequestError(f"{_pair(first, other)} have other configs ({shown}): only models of one kind average.")
        _check_tensors(first, other)
        for file in ("tokenizer.json", "chat_template.jinja"):
            if _content(first, file) != _content(other, file):
                warnings.append(f"{file} differs between {_pair(first, other)}: the first is taken.")
    return tuple(warnings)


def _comparable_config(ingredient: Ingredient) -> dict[str, Any]:
    config = read_config(ingredient.source.folder)
    if config.get("quantization_config") or config.get("compression_config"):
        raise RequestError(
            f"{ingredient.source.given} is stored quantised or packed (quantization_config in its config), and such "
            "tensors cannot be averaged: give plain checkpoints."
        )
    return {key: value for key, value in config.items() if key not in _CONFIG_IGNORED}


def _check_tensors(first: Ingredient, other: Ingredient) -> None:
    ours, theirs = first.checkpoint.entries, other.checkpoint.entries
    for has, lacks, names in ((first, other, ours.keys() - theirs.keys()), (other, first, theirs.keys() - ours.keys())):
        if names:
            raise RequestError(
                f"{has.source.given} has {_names(names)}, which {lacks.source.given} lacks: only models of one kind "
                "average."
            )
    for name, mine in ours.items():
        yours = theirs[name]
        if mine.shape != yours.shape or mine.dtype != yours.dtype:
            raise RequestError(
                f"{name} is {mine.dtype} {list(mine.shape)} in {first.source.given} and {yours.dtype} "
                f"{list(yours.shape)} in {other.source.given}: only tensors of one shape and dtype average."
            )


def survey(ingredients: Sequence[Ingredient], masks: Masks, progress: Progress) -> list[TensorSurvey]:
    """Read every tensor of all inputs once, one tensor at a time.

    Raises RequestError for NaN or Inf, for integers that differ, and for different zeros where `masks` is "same".
    """
    found: list[TensorSurvey] = []
    differing: dict[str, int] = {}
    for name in ingredients[0].checkpoint.entries:
        tensors = [ingredient.checkpoint.read(name) for ingredient in ingredients]
        floats = ingredients[0].checkpoint.entries[name].dtype in FLOATS
        identical = all(same_bytes(tensors[0], tensor) for tensor in tensors[1:])
        if not floats and not identical:
            raise RequestError(
                f"{name} holds {ingredients[0].checkpoint.entries[name].dtype}, which cannot be averaged, and differs "
                f"between {_all(ingredients)}."
            )
        if floats:
            for ingredient, tensor in zip(ingredients, tensors, strict=True):
                _check_finite(name, ingredient, tensor)
        sparse = floats and any(is_sparse(tensor) for tensor in tensors)
        if sparse and not identical:
            keep = tensors[0] != 0
            count = sum(int(((tensor != 0) != keep).count_nonzero()) for tensor in tensors[1:])
            if count:
                differing[name] = count
        zeros = tuple(t.numel() - int(t.count_nonzero()) if floats else 0 for t in tensors)
        found.append(TensorSurvey(name, identical, sparse, zeros, tensors[0].numel()))
        progress.advance()
    if differing and masks == "same":
        raise RequestError(
            f"The zeros of {_names(differing)} lie elsewhere in the other models than in "
            f"{ingredients[0].source.given} ({sum(differing.values()):,} weights), so an average would be less sparse: "
            "average models trained from one pruned checkpoint with its mask held, or choose --masks union (keep what "
            "any keeps) or --masks intersection (keep what all keep)."
        )
    return found


def _check_finite(name: str, ingredient: Ingredient, tensor: torch.Tensor) -> None:
    if kind := broken(tensor):
        raise RequestError(
            f"{name} of {ingredient.source.given} holds {kind}: the checkpoint is damaged or its training diverged; "
            "leave it out, or get a sound copy."
        )


def _content(ingredient: Ingredient, file: str) -> bytes | None:
    path = ingredient.source.folder / file
    return path.read_bytes() if path.is_file() else None


def _names(names: Any) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more tensors" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


def _pair(first: Ingredient, other: Ingredient) -> str:
    return f"{first.source.given} and {other.source.given}"


def _all(ingredients: Sequence[Ingredient]) -> str:
    return ", ".join(ingredient.source.given for ingredient in ingredients)
