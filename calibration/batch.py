"""Windows of tokens on their way through a model, with the padding that fills the shorter ones up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """`ids` (samples, length) int64; `mask` (samples, length) bool is True where a token is real, None where all are.

    Padding stands behind a sample's tokens, where no causal model lets it reach them. `beside` is empty, or has for
    every sample what else the forward takes with it (pixel_values, image_grid_thw, ...), as processors make it.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None
    beside: tuple[Mapping[str, torch.Tensor], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the samples; without a mask where none of them is padded."""
        mask = None if self.mask is None or bool(self.mask[rows].all()) else self.mask[rows].contiguous()
        return Batch(self.ids[rows], mask, self.beside[rows])

    @property
    def length(self) -> int:
        """Of every sample, with its padding."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """How many are real."""
        return self.ids.numel() if self.mask is None else int(self.mask.count_nonzero())

    @property
    def lengths(self) -> Sequence[int]:
        """The real tokens of every sample."""
        return [self.length] * len(self) if self.mask is None else self.mask.sum(1).tolist()

    def _alone(self, row: int) -> Batch:
        return Batch(self.ids[row : row + 1, : self.lengths[row]], None, self.beside[row : row + 1])

    def split(self, samples: int) -> list[Batch]:
        """Batches of so many samples in order, the last one with what is left.

        Samples with something beside them go alone and without padding: how theirs would be joined, processors know.
        """
        if self.beside:
            return [self._alone(row) for row in range(len(self))]
        return [self[first : first + samples] for first in range(0, len(self), samples)]


def joined(batches: Sequence[Batch]) -> Batch:
    """The samples of all `batches`, which are of one length, in order."""
    masks = [torch.ones_like(each.ids, dtype=torch.bool) if each.mask is None else each.mask for each in batches]
    mask = torch.cat(masks) if any(each.mask is not None for each in batches) else None
    beside = tuple(sample for each in batches for sample in each.beside)
    return Batch(torch.cat([each.ids for each in batches]), mask, beside)
