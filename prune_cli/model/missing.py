"""Why a parameter has no tensor: what is in the way, as far as the names in the checkpoint tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from prune_cli.checkpoint.reader import not_there
from prune_cli.errors import RequestError

_LORA = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)\.")
# Modules around a model that add a part to the names of what is in them, and who puts them there.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
    "module": "DistributedDataParallel",
}


def why_missing(parameter: str, base: str, names: Collection[str], absent: Mapping[str, str]) -> str:
    """One sentence; `base` is the prefix that checkpoints may leave out, `absent` what the index names in vain."""
    there = f"{parameter} is not in the checkpoint though config.json describes it"
    if parameter in absent:
        return f"{not_there(parameter, absent[parameter])}: download the checkpoint again."
    if found := _wrapped(names) or _prefixed(parameter, base, names):
        return f"{there}: {found}."
    return f"{there}: the weights and the config do not belong together, or a shard was lost."


def check_merged(names: Iterable[str]) -> None:
    """Raise RequestError where one of `names`, which the model has not, is of a LoRA layer."""
    name = next((name for name in names if _LORA.search(name)), None)
    if name is not None:
        raise RequestError(
            f"The checkpoint's LoRA layers were never merged (as {name}): merge them into the model first "
            "(peft's merge_and_unload)."
        )


def _wrapped(names: Iterable[str]) -> str | None:
    for name in names:
        parts = name.split(".")
        for wrapper, who in _WRAPPERS.items():
            if parts[0] == wrapper or (wrapper.startswith("_") and wrapper in parts):
                return (
                    f"{wrapper}. in the names is of a wrapper ({who}) that was saved with the model, as in {name}, "
                    "save the model inside it"
                )
    return None


def _prefixed(parameter: str, base: str, names: Iterable[str]) -> str | None:
    endings = (f".{parameter}", f".{parameter.removeprefix(base + '.')}")
    for name in names:
        for ending in endings:
            prefix = name.removesuffix(ending)
            if prefix != name and prefix != base:
                return f"the names begin with {prefix}. there, as in {name}, take that out or save the model inside"
    return None
