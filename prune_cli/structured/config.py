"""The part of config.json that describes the language model, and what transformers makes of a changed one."""

from __future__ import annotations

import json
from typing import Any

from prune_cli.errors import RequestError, one_line
from prune_cli.model.streamed_model import StreamedModel


def text_config(raw: dict[str, Any], config: Any) -> tuple[Any, dict[str, Any]]:
    """The config of the language model and its part of `raw`, in which changes belong."""
    text, part = config.get_text_config(), raw
    for name in _path_to(config, text):
        if name in part:
            part = part[name]  # without it, as in the first Qwen2-VL, its keys are among those of the whole
    return text, part


def _path_to(config: Any, wanted: Any) -> list[str]:
    """The keys under which `wanted` lies in `config`."""
    if config is wanted:
        return []
    for name in type(config).sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and any(part is wanted for part in _parts(inner)):
            return [name, *_path_to(inner, wanted)]
    raise RequestError(f"{type(config).__name__} does not say where the config of its language model is.")


def _parts(config: Any) -> list[Any]:
    inner = [getattr(config, name, None) for name in type(config).sub_configs]
    return [config, *(part for each in inner if each is not None for part in _parts(each))]


def config_from(raw: dict[str, Any], model: StreamedModel) -> Any:
    """The config that transformers makes of `raw`; raises RequestError where it refuses it."""
    try:
        return type(model.config).from_dict(json.loads(json.dumps(raw), object_hook=_float))
    except Exception as error:  # whatever transformers' validators raise
        raise RequestError(
            f"This architecture's config cannot describe the smaller model ({one_line(error)}): choose other blocks."
        ) from error


def _float(item: dict[str, Any]) -> Any:
    """How transformers writes numbers that JSON has not, as infinity."""
    return float(item["__float__"]) if item.keys() == {"__float__"} else item
