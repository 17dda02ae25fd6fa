"""Whether batches bring to a linear layer what they brought to the one before it (q/k/v, gate/up)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch


class SameInputs:
    """Tells whether the batches bring the very tensors that they brought to the previous layer (q/k/v, gate/up)."""

    def __init__(self, inputs: Sequence[torch.Tensor] = ()) -> None:
        self._last = [(weakref.ref(tensor), tensor._version) for tensor in inputs]

    def repeated(self, inputs: Sequence[torch.Tensor]) -> bool:
        """True if `inputs` are the tensors of the previous call, unchanged since."""
        same = len(inputs) == len(self._last) and all(
            reference() is tensor and version == tensor._version
            for tensor, (reference, version) in zip(inputs, self._last, strict=True)
        )
        self._last = [(weakref.ref(tensor), tensor._version) for tensor in inputs]
        return same
