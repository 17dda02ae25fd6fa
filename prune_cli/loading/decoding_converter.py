"""Where packed values become dense tensors on their way through transformers' loading."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from prune_cli.sparse.torch_tensors import SparseFiles

_MOST_THREADS = 4
# Matches every name, and takes nothing of it.
_ANYTHING = "^"


class Decode(ConversionOps):
    """The first operation of a converter: knows the files, and casts what the converter has collected."""

    def __init__(self, files: SparseFiles, dtypes: Mapping[str, torch.dtype], *, alone: bool) -> None:
        self.files = files
        self.dtypes = dtypes
        self.alone = alone
        self._pool: ThreadPoolExecutor | None = None

    def __deepcopy__(self, memo: Any) -> Decode:
        # transformers copies a converter for every parameter; they share files and threads.
        return self

    def decoded(self, name: str, given: Any) -> Any:
        """In place of what transformers reads of `name` (a future or a function), the same of the dense tensor."""
        if name not in self.files:
            return given
        if isinstance(given, Future):
            self._pool = self._pool or ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS), "prune-cli-decode")
            return self._pool.submit(self._decode, name, given.result)
        return partial(self._decode, name, given)

    def _decode(self, name: str, values: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """The packed values came to the device and dtype that the parameter is wanted in, bytes in none."""
        place = values()
        if place is None:
            return None
        dtype = place.dtype if place.is_floating_point() else None
        return self.files.read(name).to(device=place.device, dtype=dtype)

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        target = kwargs["full_layer_name"]
        dtype = self.dtypes.get(target)
        cast = {
            pattern: [tensor.to(dtype) if tensor.is_floating_point() and dtype else tensor for tensor in tensors]
            for pattern, tensors in input_dict.items()
        }
        return {target: cast[_ANYTHING]} if self.alone else cast


class DecodingConverter(WeightConverter):
    """A converter of transformers whose tensors are decoded as they are collected. Its first operation is Decode."""

    __slots__ = ()

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        decode = self.operations[0]
        assert isinstance(decode, Decode)
        super().add_tensor(target_key, source_key, source_pattern, decode.decoded(source_key, future))


def decoding(original: WeightConverter, files: SparseFiles, dtypes: Mapping[str, torch.dtype]) -> WeightConverter:
    """A copy of a model's converter that decodes first."""
    copy = deepcopy(original)
    copy.operations = [Decode(files, dtypes, alone=False), *copy.operations]
    copy.__class__ = DecodingConverter
    return copy


def decoding_rest(files: SparseFiles, dtypes: Mapping[str, torch.dtype]) -> WeightConverter:
    """For the tensors that no other converter takes: one to one."""
    return DecodingConverter([_ANYTHING], [""], [Decode(files, dtypes, alone=True)])
