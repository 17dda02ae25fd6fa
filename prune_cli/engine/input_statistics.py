"""What is gathered about the inputs of one map: a method's statistics, and rows to measure the error with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.batch import Batch
from calibration.statistics import ACCUMULATORS, BY_SAMPLE, Accumulator, Cross, RowSketch
from prune_cli.engine.memory import device_of_gram
from prune_cli.engine.padding import real_rows, rows_of_samples

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
        device_of_sums = device_of_gram(inputs, device, 1 + with_dense) if "gram" in needs else device
        self._accumulators: dict[str, Accumulator] = {
            name: ACCUMULATORS[name](inputs, device_of_sums if name == "gram" else device) for name in needs
        }
        self._cross = Cross(inputs, inputs, device_of_sums) if with_dense else None
        self._tokens = 0
        self.device_of_sums = device_of_sums
        self._sketch = RowSketch(sketch_rows(tokens), inputs, device, _SKETCH_SEED)
        self._values: dict[str, torch.Tensor] | None = None

    def add(self, tensor: torch.Tensor, dense: torch.Tensor | None, batch: Batch) -> None:
        """Take in the input of `batch`, (..., in), and what the dense model has in its place."""
        rows = real_rows(tensor, batch)
        for name, accumulator in self._accumulators.items():
            for part in rows_of_samples(rows, tensor, batch) if name in BY_SAMPLE else (rows,):
                accumulator.add(part)
        self._add_once(rows, None if dense is None else real_rows(dense, batch))

    def add_rows(self, rows: torch.Tensor, dense: torch.Tensor | None) -> None:
        """Take in `rows` (tokens, in) of one sample, and what the dense model has in their place."""
        for accumulator in self._accumulators.values():
            accumulator.add(rows)
        self._add_once(rows, dense)

    def _add_once(self, rows: torch.Tensor, dense: torch.Tensor | None) -> None:
        self._sketch.add(rows)
        self._tokens += len(rows)
        if self._cross is not None and dense is not None:
            self._cross.add(dense.detach(), rows)

    def values(self) -> dict[str, torch.Tensor]:
        if self._values is None:
            self._values = {name: accumulator.value() for name, accumulator in self._accumulators.items()}
            if self._cross is not None:
                self._values["cross"] = self._cross.value()
            self._values["tokens"] = torch.tensor(float(self._tokens))
        return self._values

    def rows(self) -> torch.Tensor:
        return self._sketch.value()
