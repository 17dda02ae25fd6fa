"""From config.json to a language model on meta: what can be pruned block by block, and what is refused."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from prune_cli.checkpoint.config_file import POSITION_LIMITS, has_tokenizer, read_config
from prune_cli.errors import RequestError, one_line
from prune_cli.model.shape_overrides import is_sized, resize
from prune_cli.sparse.config import OURS, is_ours, without_ours

# Language models, and those that have one beside parts for images or sound. The first that knows a class takes it.
_AUTO_CLASSES: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
# Their forward is no single sequence of blocks, so one block in memory at a time is impossible.
_NO_BLOCK_SEQUENCE = frozenset({"xlm", "hrm_text"})
# Their forward refuses a text without an image.
_NEEDS_IMAGES = frozenset({"idefics", "kosmos-2", "kosmos-2.5"})


def causal_config(folder: Path, trust_remote_code: bool) -> Any:
    """The config, refused unless it is that of a causal language model."""
    raw = read_config(folder)
    sparse = is_ours(raw)
    if sparse:
        raw = without_ours(raw)
    model_type = raw.get("model_type")
    native = model_type in transformers.CONFIG_MAPPING
    if not native and raw.get("auto_map") and not trust_remote_code:
        raise RequestError(f"{folder} brings its own code: read it, then add --trust-remote-code to run it.")
    if not native and not raw.get("auto_map"):
        raise RequestError(
            f"{folder} has the model type {model_type!r}, which transformers {transformers.__version__} does not know: "
            "check config.json, or upgrade transformers."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers, its validators or the checkpoint's own code raise
        raise RequestError(
            f"{folder}/config.json is refused by transformers ({one_line(error)}): correct it, or download it again."
        ) from error
    for key in OURS if sparse else ():
        if key not in raw and hasattr(config, key):
            delattr(config, key)
    _take_as_plain(config)
    _check_causal(folder, raw, config, trust_remote_code)
    return config


def _take_as_plain(config: Any) -> None:
    """Packed weights are decoded before the model sees them; who reads checkpoints has refused those that cannot be."""
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key) and not is_sized(getattr(part, key)):
                delattr(part, key)


def _check_causal(folder: Path, raw: dict[str, Any], config: Any, trust_remote_code: bool) -> None:
    architectures = raw.get("architectures") or []
    own_code = auto_class(config).__name__ in (raw.get("auto_map") or {})
    if own_code and trust_remote_code:
        return
    names = {name for auto in _AUTO_CLASSES for name in _class_names(auto, config)}
    # Code that has since become part of transformers may call its class otherwise (MPTForCausalLM).
    known = names and (not architectures or own_code or names.intersection(architectures))
    if not known or _is_encoder_decoder(config):
        found = architectures[0] if architectures else f"a model of type {config.model_type}"
        wanted = f" (expected {' or '.join(sorted(names))})" if names and not known else ""
        raise RequestError(f"{folder} is {found}, no causal language model{wanted}: only those can be pruned.")
    if config.model_type in _NO_BLOCK_SEQUENCE:
        raise RequestError(f"{folder} is a {config.model_type}, whose forward is no single sequence of blocks.")


def auto_class(config: Any) -> Any:
    """The auto class of transformers that builds and loads the class that config.json names."""
    named = set(getattr(config, "architectures", None) or ())
    fitting = [auto for auto in _AUTO_CLASSES if _class_names(auto, config)]
    return next((auto for auto in fitting if named & _class_names(auto, config)), [*fitting, AutoModelForCausalLM][0])


def _class_names(auto: Any, config: Any) -> set[str]:
    """The names of the classes that `auto` makes of a config."""
    classes = auto._model_mapping.get(type(config), None)
    return {c.__name__ for c in (classes if isinstance(classes, tuple) else (classes,)) if c is not None}


def _is_encoder_decoder(config: Any) -> bool:
    return any(getattr(part, "is_encoder_decoder", False) is True for part in (config, config.get_text_config()))


def check_block_count(config: Any, tensors: int) -> None:
    """Refuse a config of more blocks than the checkpoint has tensors, before building them takes all memory."""
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(blocks, int) and blocks > tensors:
        raise RequestError(
            f"config.json describes {blocks} blocks (num_hidden_layers), but the checkpoint has {tensors} tensors: "
            "the weights and the config do not belong together."
        )


def model_on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with torch.device("meta"), no_init_weights():  # drawing nothing on meta takes long, block by block
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()
    except ImportError as error:
        raise RequestError(f"This model needs a package that is not installed ({one_line(error)}).") from error
    except Exception as error:  # whatever transformers or the checkpoint's own code raise
        raise RequestError(
            f"config.json describes no model that transformers can build ({one_line(error)}): "
            "correct it, or download the checkpoint again."
        ) from error
    # Encoders of the BERT family carry the name of a causal model also where they read in both directions.
    causal = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    if getattr(model.config, "is_decoder", None) is False and True not in causal:
        raise RequestError(
            f"config.json says that this {type(model).__name__} is no decoder (is_decoder is false), so it is "
            "no causal language model: only those can be pruned."
        )
    _check_runs_on_text(model)
    if is_sized(sizes := getattr(config, "quantization_config", None)):
        resize(model, sizes)
    return model.eval().requires_grad_(False)


def _check_runs_on_text(model: PreTrainedModel) -> None:
    parameters = list(inspect.signature(model.forward).parameters.values())
    needed = [
        each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty
    ]
    needed = [name for name in needed if name != "input_ids"]
    if needed or model.config.model_type in _NEEDS_IMAGES:
        what = needed[0] if needed else "images"
        raise RequestError(
            f"{type(model).__name__} does not run on text alone (its forward needs {what}), "
            "so it is no causal language model: only those can be pruned."
        )


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: known block classes first, then most parameters, then the shallowest."""
    decoder = model.get_decoder()
    root = decoder if isinstance(decoder, nn.Module) else model
    known = set(model._no_split_modules or ())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(module is inner for inner in root.modules())
    ]
    if not lists:
        raise RequestError(
            f"{type(model).__name__} has no list of decoder blocks, so it cannot be pruned block by block."
        )

    def rank(item: tuple[str, nn.ModuleList]) -> tuple[bool, int, int]:
        name, module = item
        is_known = any(type(element).__name__ in known for element in module)
        return is_known, sum(parameter.numel() for parameter in module.parameters()), -name.count(".")

    return max(lists, key=rank)


def setting(config: Any, name: str) -> Any:
    """What `config` has under `name`; None where it has nothing, or something else for each layer."""
    try:
        return getattr(config, name, None)
    except Exception as error:  # transformers' own, which not all its versions have
        if type(error).__name__ != "AmbiguousGlobalPerLayerAttributeError":
            raise
        return None


def load_tokenizer(folder: Path, trust_remote_code: bool, config: Any | None = None) -> Any | None:
    """The checkpoint's tokenizer, or None where the folder has none; its `config` is read unless it is given."""
    if not has_tokenizer(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise RequestError(
            f"The tokenizer in {folder} cannot be loaded ({one_line(error)}): download its files again, "
            "or give pre-tokenised text as a .safetensors file with input_ids."
        ) from error


def position_limit(config: Any) -> int | None:
    """The longest sequence that the config allows, None where it names none."""
    text = config.get_text_config()
    limits = [setting(text, name) for name in POSITION_LIMITS]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def calm_libraries() -> None:
    """Silence the warnings of libraries, which would bury a command's own messages."""
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
