"""Failures of a model's own code: of a config that describes no model that runs, or of a text that it does not take."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn

import calibration
import methods
from prune_cli.errors import PruneError, one_line

_OURS = tuple(str(folder) for folder in (Path(__file__).parents[1], *methods.__path__, *calibration.__path__))
_TORCH = str(Path(torch.__file__).parent)


@contextmanager
def own_failures_told(model: nn.Module) -> Iterator[None]:
    """Around the forward of `model`. Raises PruneError for what its own code raises; all else passes as it is."""
    try:
        yield
    except PruneError:
        raise
    except Exception as error:  # whatever the model's own code raises
        if not _is_own(error):
            raise
        raise PruneError(
            f"The code of {type(model).__name__} fails on this text ({one_line(error)}): if plain transformers "
            f"{transformers.__version__} fails too, correct config.json or give other text; else please report it."
        ) from error


def _is_own(error: Exception) -> bool:
    """Whether torch was called by the model when it failed, and not by us. Memory and files are nobody's failures."""
    if isinstance(error, OSError | MemoryError) or "out of memory" in str(error):
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    outside_torch = [file for file in files if not file.startswith((_TORCH, "<"))]
    return bool(outside_torch) and not outside_torch[-1].startswith(_OURS)
