"""The model without its weights, which come and go block by block.

The calls into `transformers.core_model_loading` are undocumented: they stay in this file and in `places.py`, and a
block is checked after each load (nothing may be left on meta).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from calibration.batch import Batch
from prune_cli.checkpoint.block_tensors import BlockTensors
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.errors import PruneError
from prune_cli.model.architecture import (
    causal_config,
    check_block_count,
    find_blocks,
    model_on_meta,
    position_limit,
    setting,
)
from prune_cli.model.moe import drop_unread, stores_unread
from prune_cli.model.own_failure import own_failures_told
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.model.tensor_map import TensorMapper


class StreamedModel:
    """A language model on meta, its blocks, and a `TensorInfo` for every tensor of the checkpoint.

    Raises RequestError where the checkpoint is no causal LM that can be run block by block, or disagrees with its
    config. `config_folder` holds config.json (it may differ from the folder of the tensors), unless `config` is given.
    """

    def __init__(
        self,
        config_folder: Path,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool,
        config: Any = None,
    ) -> None:
        config = causal_config(config_folder, trust_remote_code) if config is None else config
        check_block_count(config, len(checkpoint.entries))
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.model = model_on_meta(config, dtype, trust_remote_code)
        self.config = config
        self.without_unread = not stores_unread(self.model, checkpoint.entries)
        if self.without_unread:
            drop_unread(self.model)
        self.blocks_name, block_list = find_blocks(self.model)
        self.blocks: list[nn.Module] = list(block_list)
        self._expected: dict[str, torch.Tensor] = dict(self.model.state_dict())
        mapping = get_model_conversion_mapping(self.model)
        self._load_config = LoadStateDictConfig(
            device_map={"": str(device)},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=mapping,  # pyright: ignore[reportArgumentType]
        )
        self._tied = dict(self.model.all_tied_weights_keys)
        finder = TensorMapper(self.model, self.blocks_name, self._expected, self._tied)
        self.tensor_map = finder.find(checkpoint, mapping)
        self._untie_what_differs()
        finder.check_nothing_missing(self.tensor_map, checkpoint.absent)
        self._fill_buffers()
        self._on_demand = self._prepare_on_demand()

    # --- what belongs where -------------------------------------------------------------------------------------

    def _untie_what_differs(self) -> None:
        """Like transformers: a tied pair whose two stored tensors differ is not tied."""
        stored = {info.parameter: name for name, info in self.tensor_map.items()}
        for alias, source in list(self._tied.items()):
            if alias in stored and source in stored:
                pair = self.checkpoint.read(stored[alias]), self.checkpoint.read(stored[source])
                if not torch.equal(*pair):
                    del self._tied[alias]

    def tied_names(self, name: str) -> tuple[str, ...]:
        """The other checkpoint tensors that hold the same parameter as `name` (a tied head stored beside it)."""
        if self.tensor_map[name].expert is not None:
            return ()  # those of other experts lie in the same parameter
        parameter = self.tensor_map[name].parameter
        root = self._tied.get(parameter or "", parameter)
        return tuple(
            other
            for other, info in self.tensor_map.items()
            if other != name and info.parameter and self._tied.get(info.parameter, info.parameter) == root
        )

    def shape_of(self, parameter: str) -> tuple[int, ...]:
        return tuple(self._expected[parameter].shape)

    # --- weights in and out -------------------------------------------------------------------------------------

    def _fill_buffers(self) -> None:
        """Buffers that no checkpoint holds (rotary tables, ...) get their values before any weight is there.

        Parameters are marked as done: drawing values on meta would take as long as all the rest.
        """
        # Version 5 of transformers fills them so in from_pretrained; found right in 82 of 82 architectures.
        self.model._move_missing_keys_from_meta_to_device(set(), None, None, None)  # pyright: ignore[reportArgumentType]
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        self.model.initialize_weights()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def _prepare_on_demand(self) -> dict[nn.Module, list[str]]:
        """Embeddings and head load when called: embeddings are done after the first block, the head comes last.

        So does what stands beside the language model, as a vision tower, most of which no text ever reaches.
        """
        head = self.model.get_output_embeddings()
        beside = self._beside_decoder()
        modules: dict[nn.Module, list[str]] = {}
        for path, module in self.model.named_modules():
            outside = not path.startswith(self.blocks_name + ".")
            whole = module is head or isinstance(module, nn.Embedding)
            if outside and (whole or module in beside):
                own = {name for name, _ in module.named_parameters(path, recurse=whole)}
                own |= {name for name, _ in module.named_buffers(path, recurse=whole)}
                wanted = own | {self._tied[name] for name in own if name in self._tied}
                wanted |= {alias for alias, source in self._tied.items() if source in own}
                names = [name for name, info in self.tensor_map.items() if info.parameter in wanted]
                modules[module] = names
                module.register_forward_pre_hook(self._load_when_called(module, names))
        self._when_called = {module for module in modules if module is head or module in beside}
        return modules

    def _beside_decoder(self) -> set[nn.Module]:
        """The modules with parameters of their own that are no part of the decoder."""
        decoder = self.model.get_decoder()
        inner = list((decoder if isinstance(decoder, nn.Module) else self.model).modules())
        around = [module for module in self.model.modules() if inner[0] in module.modules()]
        # A model says that it is where its first parameter is.
        first = [next(module.parameters()) for module in around]
        here = [
            module for module in self.model.modules() if any(p is f for p in module._parameters.values() for f in first)
        ]
        stay = {*inner, *around, *here}
        return {module for module in self.model.modules() if module not in stay and module._parameters}

    def _load_when_called(self, module: nn.Module, names: list[str]) -> Any:
        def load(*_: object) -> None:
            if any(parameter.is_meta for parameter in module.parameters()):
                self._load(names, self.checkpoint)

        return load

    def block_names(self, index: int) -> list[str]:
        """The checkpoint tensors of one block."""
        return [name for name, info in self.tensor_map.items() if info.block == index]

    def module_of(self, name: str) -> nn.Module:
        """The module that computes with the tensor `name`, of experts that of all."""
        info = self.tensor_map[name]
        return self.model.get_submodule(info.module_name if info.expert is None else info.expert.module)

    def linear_layers(self, index: int) -> list[str]:
        """The tensors of one block that are linear layers, pruned or not."""
        return [name for name in self.block_names(index) if self.tensor_map[name].role == "linear map"]

    def load_block(self, index: int, checkpoint: Checkpoint) -> BlockTensors:
        """Load one block; returns its tensors as stored. Raises PruneError if a parameter stays without a value."""
        tensors = self._load(self.block_names(index), checkpoint)
        for name, parameter in self.blocks[index].named_parameters():
            if parameter.is_meta:
                raise PruneError(
                    f"{self.blocks_name}.{index}.{name} got no value from the checkpoint: transformers "
                    f"{transformers.__version__} does not load this architecture as expected; please report it."
                )
        return tensors

    def read_ahead(self, index: int) -> None:
        """Have the system fetch a block that comes next, if there is one."""
        if index < len(self.blocks):
            self.checkpoint.read_ahead(iter(self.block_names(index)))

    def load_outside(self) -> None:
        """Load everything outside the blocks but what loads when it is called: the head, the parts for images."""
        at_once = {
            name for module, names in self._on_demand.items() if module not in self._when_called for name in names
        }
        later = {name for module in self._when_called for name in self._on_demand[module]} - at_once
        outside = [name for name, info in self.tensor_map.items() if info.block is None and info.parameter]
        self._load([name for name in outside if name not in later], self.checkpoint)

    def _load(self, names: Sequence[str], checkpoint: Checkpoint) -> BlockTensors:
        tensors = BlockTensors(checkpoint, names)
        with _quiet():
            convert_and_load_state_dict_in_model(self.model, tensors.to_load(), self._load_config)
        for alias, source in self._tied.items():
            if not self._get(source).is_meta:
                self._set(alias, self._get(source))
            elif not self._get(alias).is_meta:
                self._set(source, self._get(alias))
        return tensors

    def unload_block(self, index: int) -> None:
        for name in self.block_names(index):
            self._unload(self.tensor_map[name].parameter)
        for name, parameter in self.blocks[index].named_parameters():
            if not parameter.is_meta:
                self._unload(f"{self.blocks_name}.{index}.{name}")

    def unload_embeddings(self) -> None:
        """Embeddings have done their work once every batch has reached the first block."""
        for names in self._on_demand.values():
            for name in names:
                parameter = self.tensor_map[name].parameter
                self._unload(parameter)
                for alias, source in self._tied.items():
                    if parameter in (alias, source):
                        self._unload(alias)
                        self._unload(source)

    def _unload(self, parameter: str | None) -> None:
        if parameter is not None:
            self._set(parameter, self._expected[parameter])

    def _get(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(path), leaf)

    def _set(self, name: str, value: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = (
                value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            )

    def set_weight(self, info: TensorInfo, value: torch.Tensor) -> None:
        """Put a new value, in the checkpoint's orientation and dtype, where the model computes with it."""
        assert info.parameter is not None
        dtype = self._get(info.parameter).dtype
        value = value.mT if info.expert is not None and info.expert.turned else value
        self._set(info.parameter, value.to(self.device, dtype))

    def make_own(self, info: TensorInfo) -> None:
        """Give a parameter bytes of its own, where it may be a view on a file, so that parts of it can be set."""
        assert info.parameter is not None
        self._set(info.parameter, self._get(info.parameter).clone())

    def set_expert(self, info: TensorInfo, expert: int, value: torch.Tensor) -> None:
        """Put the matrix of one expert, in the checkpoint's orientation and dtype, where the model computes with it."""
        assert info.parameter is not None
        assert info.expert is not None
        target = info.expert.matrices(self._get(info.parameter))[expert]
        if info.expert.index is not None:
            target = target[info.expert.first : info.expert.first + len(value)]
        target.copy_(value.mT if info.expert.turned else value)

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """As the config has it, or else as the embeddings of the tokens do (BLT)."""
        size = setting(self.config.get_text_config(), "hidden_size")
        if isinstance(size, int):
            return size
        embeddings = self.model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        return embeddings.embedding_dim

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def position_limit(self) -> int | None:
        return position_limit(self.config)

    def forward(self, batch: Batch) -> Any:
        """The model's own forward on token ids and what stands beside them, without cache.

        Raises PruneError where the model's own code fails.
        """
        padding = {}
        # A model that takes no mask is causal all the same: padding behind the tokens does not reach them.
        if batch.mask is not None and self.takes("attention_mask"):
            padding = {"attention_mask": batch.mask.to(self.device, torch.int64)}
        beside = {name: self._as_input(each) for sample in batch.beside for name, each in sample.items()}
        with own_failures_told(self.model):
            return self.model(input_ids=batch.ids.to(self.device), use_cache=False, **padding, **beside)

    def _as_input(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def takes(self, name: str) -> bool:
        """Whether the model's forward has a parameter called `name`."""
        return name in inspect.signature(self.model.forward).parameters


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers for every block: the run has its own."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
