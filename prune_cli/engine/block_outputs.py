"""The hidden states among what a block returns."""

from __future__ import annotations

from typing import Any

import torch

from prune_cli.errors import PruneError


def hidden_states(output: Any) -> torch.Tensor:
    """Those among what a block returns. Raises PruneError where there are none."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, torch.Tensor):
        raise PruneError(
            f"The blocks of this architecture return a {type(output).__name__}, in which the hidden states are not "
            "found: blocks of it can be neither compared nor matched (-m depth: name them with -o which=)."
        )
    return first
