"""Makes small checkpoints on disk, in the layouts that published causal language models come in."""

import string
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny_configs import ARCHITECTURES, BOS, EOS, VOCABULARY, tiny_config

__all__ = [
    "ARCHITECTURES",
    "BOS",
    "EOS",
    "VOCABULARY",
    "load_plain",
    "save_gpt2_without_prefix",
    "save_tiny",
    "tiny_config",
    "tiny_tokenizer",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, for ASCII: all 256 bytes would not fit the models' 128 entries."""
    # How byte-level vocabularies spell the space, the newline and the tab. One of words would be simpler, but
    # transformers loads the tokenizer of some models (qwen2) as byte pairs whatever the file says.
    entries = ["<s>", "</s>", "<unk>", "Ġ", "Ċ", "ĉ", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def _build(architecture: str, seed: int, config_overrides: dict[str, object]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **config_overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms of ones and biases of zeros would hide a tensor that is dropped or mixed up with another.
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return cast("PreTrainedModel", model)


def save_tiny(
    folder: Path,
    architecture: str,
    *,
    dtype: torch.dtype = torch.float32,
    shards: bool = True,
    seed: int = 0,
    tokenizer: bool = True,
    **config_overrides: object,
) -> Path:
    model = _build(architecture, seed, config_overrides)
    nn.Module.to(model, dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 4 if shards else 2 * size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def save_gpt2_without_prefix(folder: Path) -> Path:
    """The names of the first gpt2 upload: no prefix, no head, and the causal masks stored as if they were weights."""
    save_tiny(folder, "gpt2", shards=False)
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors.pop("lm_head.weight", None)
    positions = tensors["wpe.weight"].shape[0]
    for block in range(3):
        tensors[f"h.{block}.attn.bias"] = torch.ones(1, 1, positions, positions).tril()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
