"""The one collector of input statistics: what is gathered about the inputs of a linear layer, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from calibration.batch import Batch
from calibration.statistics import ACCUMULATORS, BY_SAMPLE, Accumulator, Cross, Gram, InOrder, RowSketch
from prune_cli.engine.memory import device_of_gram
from prune_cli.engine.padding import real_rows, rows_of_samples
from prune_cli.ranks.ranks import ALONE, Ranks

_SKETCH_SEED = 0
# Up to this many tokens the output error is exact; above, it is estimated from a sketch of 1/64 of the tokens.
_EXACT_TOKENS = 1024
_SKETCH_LIMITS = (128, 1024)


def sketch_rows(tokens: int) -> int:
    """How many rows stand for `tokens` tokens when a linear layer's output error is measured."""
    if tokens <= _EXACT_TOKENS:
        return tokens
    least, most = _SKETCH_LIMITS
    return min(max(tokens // 64, least), most)


class InputStatistics:
    """What is known about the inputs of one linear layer, or of several that read the same tensor.

    A plain value that can be pickled: processes that each took in some of the batches exchange theirs and `merge` them.
    It holds, with the number of tokens where that is needed:

    - for every name of `needs` but gram one sum (in,) in `sum_dtype`, for variance two;
    - gram (in, in) float32, of which the upper triangle counts, and with `with_dense` cross (in, in) float32;
      both have one more row and column with `constant`, for an input that is always 1 and stands for the bias;
    - with `sketch_of`, the number of tokens of all processes, a sketch (sketch_rows(sketch_of), in) float32.

    With `share` they are those of one of several ranks, each of which takes in its batches, until they `combine`.

    `device_of_sums` is where gram, cross and output_cross are kept: the host where `device` has no room for them.
    """

    def __init__(
        self,
        needs: Sequence[str],
        inputs: int,
        device: torch.device,
        *,
        with_dense: bool = False,
        constant: bool = False,
        sketch_of: int | None = None,
    ) -> None:
        self._kind = (tuple(needs), inputs, with_dense, constant, sketch_of)
        self._constant = constant and "gram" in needs
        size = inputs + self._constant
        self.device_of_sums = device_of_gram(size, device, 1 + with_dense) if "gram" in needs else device
        self._accumulators: dict[str, Accumulator] = {
            name: ACCUMULATORS[name](size, self.device_of_sums)
            if name == "gram"
            else ACCUMULATORS[name](inputs, device)
            for name in needs
        }
        self._cross = Cross(size, size, self.device_of_sums) if with_dense else None
        self._sketch = None
        if sketch_of is not None:
            self._sketch = RowSketch(sketch_rows(sketch_of), inputs, device, _SKETCH_SEED)
        self._tokens = 0
        self._device = device
        self._ranks = ALONE
        self._values: dict[str, torch.Tensor] | None = None

    @property
    def with_dense(self) -> bool:
        return self._cross is not None

    def add(self, tensor: torch.Tensor, dense: torch.Tensor | None, batch: Batch) -> None:
        """Take in the input of `batch`, (..., in), and what the dense model has in its place."""
        rows = real_rows(tensor, batch)
        by_sample = rows_of_samples(rows, tensor, batch) if BY_SAMPLE.intersection(self._accumulators) else (rows,)
        self._add(rows, by_sample, None if dense is None else real_rows(dense, batch))

    def add_batches(
        self, inputs: Sequence[torch.Tensor], dense: Sequence[torch.Tensor] | None, batches: Sequence[Batch]
    ) -> None:
        """`add` for each of `batches`, in order."""
        for tensor, other, batch in zip(inputs, dense or [None] * len(inputs), batches, strict=True):
            self.add(tensor, other, batch)

    def add_rows(self, rows: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """Take in `rows` (tokens, in) of one sample, and what the dense model has in their place."""
        self._add(rows, (rows,), dense)

    def _add(self, rows: torch.Tensor, by_sample: Sequence[torch.Tensor], dense: torch.Tensor | None) -> None:
        self._values = None
        self._tokens += len(rows)
        with_constant = self._with_constant(rows)
        for name, accumulator in self._accumulators.items():
            for part in by_sample if name in BY_SAMPLE else (with_constant if name == "gram" else rows,):
                accumulator.add(part)
        if self._sketch is not None:
            self._sketch.add(rows)
        if self._cross is not None and dense is not None:
            self._cross.add(self._with_constant(dense.detach()), with_constant)

    def _with_constant(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if self._constant else rows

    def skip(self, tokens: int) -> None:
        """Let `tokens` pass, between those that are added, that another process takes in."""
        if self._sketch is not None:
            self._sketch.skip(tokens)

    def share(self, ranks: Ranks, tokens_before: int) -> InputStatistics:
        """Before anything is added: take in this rank's batches, behind `tokens_before` tokens of earlier ranks."""
        self._ranks = ranks
        if ranks.several:
            self.skip(tokens_before)
            inputs = self._kind[1]
            for name in self._accumulators.keys() - {"gram"}:
                self._accumulators[name] = InOrder(partial(ACCUMULATORS[name], inputs, self._device))
        return self

    def combine(self) -> InputStatistics:
        """Those of all ranks' batches from now on, a step that every rank takes.

        What is (in,) was summed batch by batch and has the bits that one process would give it.
        """
        if self._ranks.several:
            own = {name: each for name, each in self._accumulators.items() if isinstance(each, InOrder)}
            parts = self._ranks.gathered((self._tokens, {name: each.pieces for name, each in own.items()}))
            self._tokens = sum(tokens for tokens, _ in parts)
            for name, each in own.items():
                each.pieces = [piece for _, pieces in parts for piece in pieces[name]]
                self._accumulators[name] = each.merged()
            gram = self._accumulators.get("gram")
            for whole in (gram, self._cross, self._sketch):
                if isinstance(whole, Gram | Cross | RowSketch):
                    self._ranks.add_up(whole.total)
            self._values = None
        return self

    def merge(self, other: InputStatistics) -> None:
        """Take in what `other` has gathered of other batches: as if all had been added here, up to rounding.

        Where each has seen one batch and they are merged in order, sq_norm, mean and variance have the same bits.
        Raises ValueError where `other` gathers something else, or did not `skip` this one's tokens in its sketch.
        """
        if self._kind != other._kind:
            raise ValueError(f"Statistics of different kinds cannot be merged: {self._kind} and {other._kind}.")
        self._values = None
        self._tokens += other._tokens
        if self._sketch is not None and other._sketch is not None:
            self._sketch.merge(other._sketch)
        for name, accumulator in self._accumulators.items():
            accumulator.merge(other._accumulators[name])
        if self._cross is not None and other._cross is not None:
            self._cross.merge(other._cross)

    def values(self) -> dict[str, torch.Tensor]:
        """By name, those of `needs` and cross, in float32, and tokens (), how many rows there were."""
        if self._values is None:
            self._values = {name: accumulator.value() for name, accumulator in self._accumulators.items()}
            if self._cross is not None:
                self._values["cross"] = self._cross.value()
            self._values["tokens"] = torch.tensor(float(self._tokens))
        return self._values

    def rows(self) -> torch.Tensor:
        """A few rows (rows, in) float32 that stand for all tokens: see RowSketch."""
        assert self._sketch is not None
        return self._sketch.value()

    def output_cross(
        self, out: int, wanted: Iterable[torch.Tensor], inputs: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> Cross:
        """The sum over tokens of t^T x (out, in), t (tokens, out) being the `wanted` outputs for each of `batches`.

        They differ between layers that share their inputs x (..., in), so this is no part of these statistics. Of all
        ranks' batches, as these were shared.
        """
        width = self._kind[1] + self._constant
        total = Cross(out, width, self.device_of_sums)
        for t, x, batch in zip(wanted, inputs, batches, strict=True):
            total.add(t, self._with_constant(real_rows(x, batch)))
        self._ranks.add_up(total.total)
        return total
