"""What is gathered about the inputs of one map: a method's statistics, and rows to measure the error with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.statistics import ACCUMULATORS, BY_SAMPLE, Accumulator, Cross, RowSketch
from prune_cli.memory import home_of_gram

_SKETCH_SEED = 0
# Up to this many tokens the output error is exact; above, it is estimated from a sketch of 1/64 of the tokens.
_EXACT_TOKENS = 1024
_SKETCH_LIMITS = (128, 1024)


def sketch_rows(tokens: int) -> int:
    """How many rows stand for `tokens` tokens when a map's output error is measured."""
    if tokens <= _EXACT_TOKENS:
        return tokens
    least, most = _SKETCH_LIMITS
    return min(max(tokens // 64, least), most)


class InputStatistics:
    """What is known about the inputs of one map, or of several that read the same tensor."""

    def __init__(
        self, needs: Sequence[str], inputs: int, tokens: int, device: torch.device, *, with_dense: bool
    ) -> None:
        home = home_of_gram(inputs, device, 1 + with_dense) if "gram" in needs else device
        self._accumulators: dict[str, Accumulator] = {
            name: ACCUMULATORS[name](inputs, home if name == "gram" else device) for name in needs
        }
        self._cross = Cross(inputs, inputs, home) if with_dense else None
        self._tokens = 0
        self.home = home
        self._sketch = RowSketch(sketch_rows(tokens), inputs, device, _SKETCH_SEED)
        self._values: dict[str, torch.Tensor] | None = None

    def add(self, tensor: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """Take in the input of one batch, (..., in), and what the dense model has in its place."""
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        for name, accumulator in self._accumulators.items():
            for part in rows.split(tensor.shape[-2]) if name in BY_SAMPLE else (rows,):
                accumulator.add(part)
        self._sketch.add(rows)
        self._tokens += len(rows)
        if self._cross is not None and dense is not None:
            self._cross.add(dense.detach().reshape(rows.shape), rows)

    def values(self) -> dict[str, torch.Tensor]:
        if self._values is None:
            self._values = {name: accumulator.value() for name, accumulator in self._accumulators.items()}
            if self._cross is not None:
                self._values["cross"] = self._cross.value()
            self._values["tokens"] = torch.tensor(float(self._tokens))
        return self._values

    def rows(self) -> torch.Tensor:
        return self._sketch.value()
