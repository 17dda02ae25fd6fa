"""The format's entry in transformers: from_pretrained of a sparse checkpoint gives the dense model.

Works with the hooks of transformers 5.17 and of 5.23, which differ; nothing of it stays on the loaded model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prune_cli.errors import RequestError
from prune_cli.sparse.config import CODE
from prune_cli.sparse.format import HIGH_SUFFIX, MASK_SUFFIX, QUANT_METHOD, VERSION, VERSIONS, is_sparse, open_shard


class SparseConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json."""

    # transformers then takes the entry off the loaded model.
    dequantize = True

    def __init__(self, version: int = VERSION, **_: Any) -> None:
        if version not in VERSIONS:
            raise RequestError(
                f"config.json has version {version!r} of sparse safetensors and this prune-cli reads {VERSIONS}: "
                "update prune-cli."
            )
        self.quant_method: Any = QUANT_METHOD
        self.version = version


class SparseQuantizer(HfQuantizer):
    """Decodes while transformers loads: weights pass its own converters, devices and dtypes as dense ones do."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: Any = None
        self._ignored: Any = None
        self._originals: list[tuple[Any, Any]] = []
        self._shapes: dict[str, torch.Size] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        super().preprocess_model(model, dtype=dtype, **kwargs)
        if getattr(model.config, "distributed_config", None) is not None:
            raise RequestError(
                "Sparse checkpoints are not loaded in parallel shards: prune-cli convert it with --format dense first."
            )
        from prune_cli.sparse.torch_tensors import SparseFiles

        paths = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        self._files = SparseFiles(
            open_shard(path) for path in paths if path.suffix == ".safetensors" and is_sparse(path)
        )
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._dtypes = _dtypes(model, dtype)
        parts = f"({re.escape(MASK_SUFFIX)}|{re.escape(HIGH_SUFFIX)})$"
        self._ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(self._ignored or ()), parts}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """The model's converters, each taking decoded tensors, and one for what none of them takes."""
        from transformers.core_model_loading import WeightConverter

        from prune_cli.loading.decoding_converter import decoding, decoding_rest

        conversions = []
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                self._originals.append((decoding(conversion, self._files, self._dtypes), conversion))
                conversions.append(self._originals[-1][0])
            else:
                conversions.append(conversion)
        rest = decoding_rest(self._files, self._dtypes)
        self._originals.append((rest, None))
        return [*conversions, rest]

    def get_weight_conversions(self) -> list[Any]:
        return []

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Leave the model as if it had been loaded from dense files. Raises RequestError for a tensor that fits not."""
        for name, tensor in model.state_dict().items():
            expected = self._shapes.get(name)
            if expected is not None and tensor.shape != expected:
                raise RequestError(
                    f"{name} has the shape {list(tensor.shape)} in the checkpoint, but {list(expected)} in the model "
                    "that config.json describes."
                )
        model._keys_to_ignore_on_load_unexpected = self._ignored
        if getattr(model.config, "auto_map", None) == CODE:
            del model.config.auto_map
        originals = {id(ours): theirs for ours, theirs in self._originals}
        used = [originals.get(id(conversion), conversion) for conversion in model._weight_conversions or ()]
        model._weight_conversions = [conversion for conversion in used if conversion is not None]
        self._files, self._originals = None, []
        return model

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True


def _dtypes(model: Any, dtype: Any) -> dict[str, torch.dtype]:
    """What each tensor is cast to when it is loaded: as it is built, but for those that a model keeps in float32."""
    kept = {re.compile(glob.replace("*", ".*")): kind for glob, kind in model._get_dtype_plan(dtype).items()}
    return {
        name: next((kind for pattern, kind in kept.items() if pattern.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def register() -> None:
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparseConfig)
        register_quantizer(QUANT_METHOD)(SparseQuantizer)
