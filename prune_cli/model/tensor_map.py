"""Which checkpoint tensor belongs where in the model, told from all names at once. With `model.py` the border to
transformers' undocumented `core_model_loading`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from prune_cli.checkpoint.reader import Checkpoint, TensorEntry
from prune_cli.errors import RequestError
from prune_cli.model.extra_heads import counted_heads, with_heads
from prune_cli.model.missing import check_merged, why_missing
from prune_cli.model.moe import expert_part
from prune_cli.model.roles import role_of
from prune_cli.model.tensor_info import TensorInfo

_WHY_OF_ATTENTION = "experts of attention are kept"
_WHY_UNREAD = "of an expert that returns what it gets and reads no weights"
# By whether the model's class knows the name as one to leave out.
_WHY_LEFT = {True: "the architecture does not use it", False: "nothing in the model has this name"}


class TensorMapper:
    """Finds places in `model` (on meta): `expected` are its parameters and buffers, `tied` maps aliases to sources."""

    def __init__(
        self, model: PreTrainedModel, blocks_name: str, expected: dict[str, torch.Tensor], tied: Mapping[str, str]
    ) -> None:
        self._model = model
        self._blocks_name = blocks_name
        self._expected = expected
        self._tied = tied

    def find(self, checkpoint: Checkpoint, mapping: list[Any]) -> dict[str, TensorInfo]:
        """A place for every tensor; raises RequestError where one's shape is not that of the config."""
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in mapping if isinstance(item, WeightConverter)]
        prefix = self._model.base_model_prefix
        ignored = _ignored_by_architecture(self._model)
        infos: dict[str, TensorInfo] = {}
        for name, entry in checkpoint.entries.items():
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._expected)
            if target not in self._expected and name in self._expected:
                target, pattern = name, None
            if target not in self._expected:
                known = any(ignored.search(each) is not None for each in (target, name))
                infos[name] = TensorInfo(entry, "unused" if known else "unknown", None, None, False, _WHY_LEFT[known])
                continue
            converter = next((each for each in converters if pattern in each.source_patterns), None)
            infos[name] = self._place(entry, target, converter, pattern)
        blocks = len(cast("nn.ModuleList", self._model.get_submodule(self._blocks_name)))
        return with_heads(infos, blocks, counted_heads(self._model.config.to_dict()))

    def _place(self, entry: TensorEntry, parameter: str, converter: Any | None, pattern: str | None) -> TensorInfo:
        expected, one_to_one = self._expected[parameter], converter is None
        if one_to_one and tuple(expected.shape) != entry.shape:
            raise RequestError(
                f"{entry.name} has shape {list(entry.shape)} but config.json describes {list(expected.shape)}: "
                "the weights and the config do not belong together."
            )
        block = self._block_of(parameter)
        role, reason = role_of(self._model, parameter, expected.ndim, in_block=block is not None)
        if role == "linear map" and not one_to_one:
            role, reason = "other", "stored in another layout than the model computes with"
        if role == "linear map" and self._shared_between_blocks(parameter):
            role, reason = "other", "shared between blocks"
        owner = self._model.get_submodule(parameter.rpartition(".")[0])
        transposed = isinstance(owner, Conv1D) and expected.ndim == 2
        in_block = role == "expert" and block is not None
        part = expert_part(self._model, parameter, entry, converter, pattern) if in_block else None
        if part == "unread":
            return TensorInfo(entry, "other", block, parameter, False, _WHY_UNREAD)
        if part == "of attention":
            return TensorInfo(entry, "attention expert", block, parameter, False, _WHY_OF_ATTENTION)
        if part is not None:
            reason, transposed = "", part.transposed
        return TensorInfo(entry, role, block, parameter, transposed, reason, part)

    def _block_of(self, parameter: str) -> int | None:
        if not parameter.startswith(self._blocks_name + "."):
            return None
        return int(parameter[len(self._blocks_name) + 1 :].split(".", 1)[0])

    def _shared_between_blocks(self, parameter: str) -> bool:
        partners = {alias for alias, source in self._tied.items() if source == parameter}
        partners |= {self._tied[parameter]} if parameter in self._tied else set()
        return any(self._block_of(partner) != self._block_of(parameter) for partner in partners)

    def check_nothing_missing(self, infos: Mapping[str, TensorInfo], absent: Mapping[str, str]) -> None:
        """Raises RequestError where a parameter has no tensor and is tied to none; `absent` as in Checkpoint.

        So do LoRA layers: without them the model is another one.
        """
        check_merged(name for name, info in infos.items() if info.parameter is None)
        found = {info.parameter for info in infos.values() if info.parameter}
        converted = {
            info.block
            for info in infos.values()
            if info.parameter and info.entry.shape != tuple(self._expected[info.parameter].shape)
        }
        found |= {alias for alias, source in self._tied.items() if source in found}
        found |= {source for alias, source in self._tied.items() if alias in found}
        ignored = "|".join(f"({pattern})" for pattern in self._model._keys_to_ignore_on_load_missing or ())
        for parameter in self._expected:
            skip = self._block_of(parameter) in converted or (ignored and re.search(ignored, parameter))
            if parameter not in found and not skip:
                raise RequestError(why_missing(parameter, self._model.base_model_prefix, infos, absent))


def _ignored_by_architecture(model: PreTrainedModel) -> re.Pattern[str]:
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)))
