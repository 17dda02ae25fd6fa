"""From config.json to the packed weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prune_cli.checkpoint.bitmask_format import bitmask_format
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.errors import RequestError
from prune_cli.packed.block_fp8 import find_block_fp8, scale_name
from prune_cli.packed.compressed_tensors import find_compressed, is_read, unread_format
from prune_cli.packed.gpt_oss import find_mxfp4
from prune_cli.packed.weight import PackedWeight

KEYS = ("quantization_config", "compression_config")
READ = "fp8 by blocks, mxfp4, and pack-, int- and float-quantized of compressed-tensors"
# What stands beside packed weights and beside nothing else.
_SCALES = (".weight_scale", "_scale_inv", ".qscale_weight")
_CODES = (".weight_packed", "_blocks")


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How `config`, a config.json, says that its weights are stored; None for plain ones."""
    wrapped = (value for value in config.values() if isinstance(value, Mapping))
    for where in (config, *wrapped):
        for key in KEYS:
            if where.get(key):
                found = where[key]
                return found if isinstance(found, Mapping) else {}
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, a config.json, of the same model with plain weights."""
    dropped = (*KEYS, "expert_dtype")
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in dropped
    }


def find_packed(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[PackedWeight]:
    """The packed weights of a checkpoint with this config.json, none if it is plain.

    Raises RequestError, naming the scheme, for one that is not read here, and naming the tensor where header and config
    disagree.
    """
    found = quantisation(config)
    if found is None:
        _check_plain(checkpoint)
        return []
    weights = _finder(checkpoint, found, config)()
    if not weights:
        raise RequestError(
            f"{checkpoint.folder}/config.json says that the weights are {_scheme(found)}, but no tensor is: "
            "the weights and the config do not belong together."
        )
    return weights


def _finder(
    checkpoint: Checkpoint, found: Mapping[str, Any], config: Mapping[str, Any]
) -> Callable[[], list[PackedWeight]]:
    method = found.get("quant_method", "compressed-tensors" if "config_groups" in found else None)
    entries = checkpoint.entries
    expert_dtype = found.get("expert_dtype", config.get("expert_dtype"))
    known: dict[str, Callable[[], list[PackedWeight]]] = {
        "fp8": lambda: find_block_fp8(entries, found, expert_dtype),
        "mxfp4": lambda: find_mxfp4(entries),
        "compressed-tensors": lambda: find_compressed(checkpoint, found),
    }
    form = bitmask_format(config)
    if form is not None and method == "compressed-tensors" and not found.get("config_groups"):
        raise RequestError(
            f"{checkpoint.folder} has its zeros left out as {form} of compressed-tensors, which today's releases "
            "load with random weights: make it dense first, with prune-cli convert --format dense."
        )
    if method not in known or (method == "compressed-tensors" and not is_read(found)):
        raise RequestError(
            f"{checkpoint.folder} is already quantised ({_scheme(found)}), in a way that is not read here ({READ} "
            "are): prune the checkpoint it was made from, then quantise."
        )
    return known[method]


def _scheme(found: Mapping[str, Any]) -> str:
    method = str(found.get("quant_method", "unknown"))
    if method != "compressed-tensors":
        return method
    return f"{method} {unread_format(found) or found.get('format') or ''}".rstrip()


def _check_plain(checkpoint: Checkpoint) -> None:
    """Codes without a config that says so would be taken for the weights themselves."""
    for name, entry in checkpoint.entries.items():
        float8 = entry.dtype.startswith("F8_") and scale_name(name, checkpoint.entries) is not None
        blocks = name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in checkpoint.entries
        if float8 or blocks or name.endswith((".weight_packed", *_SCALES)):
            raise RequestError(
                f"{name} belongs to packed weights, but config.json has no quantization_config that says how they are "
                "packed: get the config.json that the weights were published with."
            )
