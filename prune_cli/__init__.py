"""Prune a Hugging Face language model in one shot: `prune("model", "out", method="wanda", sparsity=0.5)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_cli.errors import PruneError, RequestError
from prune_cli.loading.register import register_with_transformers
from prune_cli.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from prune_cli.loading.semi_structured import SemiStructured
    from prune_cli.report.types import Report

__all__ = ["PruneError", "RequestError", "__version__", "prune", "to_semi_structured"]


# With this, from_pretrained of transformers loads sparse checkpoints.
register_with_transformers()


def prune(model: str | Path, out: str | Path, **options: Any) -> Report:
    """Prune `model` (a folder or a hub id) into the new folder `out`; returns the report.

    `options` are the fields of `PruneRequest`, named like the options of `prune-cli prune`. Raises RequestError where
    the request cannot be met and PruneError where the run fails.
    """
    from prune_cli.request.presets import with_preset
    from prune_cli.request.request import PruneRequest
    from prune_cli.run import prune as run

    return run(PruneRequest(model=str(model), out=Path(out), **with_preset(options)))


def to_semi_structured(model: nn.Module) -> SemiStructured:
    """Turn the 2:4 layers of a model on an NVIDIA GPU into PyTorch's semi-structured tensors, in place, for inference.

    Returns which layers were converted and why others were not. Raises PruneError where the model is on no GPU of
    compute capability 8.0 or newer.
    """
    from prune_cli.loading.semi_structured import to_semi_structured as convert

    return convert(model)
