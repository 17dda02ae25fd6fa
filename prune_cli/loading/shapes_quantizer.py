"""The entry of models with sizes of their own in transformers: from_pretrained makes room before it loads."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prune_cli.model.shape_overrides import QUANT_METHOD, resize


class SizesConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json; `shapes` has the shape of every parameter that differs from the config."""

    def __init__(self, shapes: dict[str, list[int]], version: int, **_: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.version = version
        self.shapes = shapes


class SizesQuantizer(HfQuantizer):
    """Resizes on meta; the weights themselves are plain."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        resize(model, self.quantization_config)
        return model

    def get_weight_conversions(self) -> list[Any]:
        return []

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        return weight_conversions

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True


def register() -> None:
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SizesConfig)
        register_quantizer(QUANT_METHOD)(SizesQuantizer)
