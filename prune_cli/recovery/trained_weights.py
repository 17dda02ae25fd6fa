"""What an end-to-end recovery trains: the kept weights themselves, with their zeros held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from methods._block_matching import rms_of_kept, width_of
from prune_cli.model.streamed_model import StreamedModel
from prune_cli.recovery.trained_block import all_trained

_USUAL_WIDTH = 256.0


class KeptWeights:
    """All `parameters` (float32, as the model computes with them) are trained; gradients of zeros are left out."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._kept = {name: value.detach() != 0 for name, value in parameters.items()}

    @property
    def optimised(self) -> Mapping[str, nn.Parameter]:
        """What the optimiser moves, and a state that is saved holds."""
        return self._parameters

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Of the optimiser: the most that a step changes is `rate` of a tensor's size, as in block matching."""
        return [
            {"params": [value], "share": rate * math.sqrt(_USUAL_WIDTH / width_of(value)) * rms_of_kept(value)}
            for value in self._parameters.values()
        ]

    def mask_gradients(self) -> None:
        """After a backward pass."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(self._kept[name])


def names_to_train(model: StreamedModel) -> list[str]:
    """The checkpoint tensors that move, in the model's order."""
    trained = all_trained(model)
    return [name for name in model.tensor_map if name in trained]
