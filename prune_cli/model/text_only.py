"""The language model of a vision or audio model as a checkpoint of its own: a causal LM."""

from __future__ import annotations

import json
import os.path
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checkpoint.source import Source
from prune_cli.errors import RequestError
from prune_cli.model.architecture import model_on_meta
from prune_cli.model.streamed_model import StreamedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONFIG = "config.json"
# What prepares images, video and sound has nothing to do any more.
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


class TextCheckpoint(Checkpoint):
    """The tensors of `whole` that `names` (new -> old) tells, under their new names; files hold others too."""

    def __init__(self, whole: Checkpoint, names: Mapping[str, str]) -> None:
        self._whole = whole
        self._names = names
        entries = {new: replace(whole.entries[old], name=new) for new, old in names.items()}
        used = {entry.file for entry in entries.values()}
        files = tuple(file for file in whole.files if file in used)
        super().__init__(whole.folder, entries, files, whole.index)

    @property
    def shows_its_files(self) -> bool:
        return False

    def read(self, name: str) -> torch.Tensor:
        return self._whole.read(self._names[name])

    def is_stored(self, name: str) -> bool:
        return name in self._names and self._whole.is_stored(self._names[name])

    def storage(self, name: str) -> tuple[int, str | None]:
        return self._whole.storage(self._names[name])

    def reopened(self) -> Checkpoint:
        return TextCheckpoint(self._whole.reopened(), self._names)

    def read_ahead(self, names: Iterator[str]) -> None:
        self._whole.read_ahead(self._names[name] for name in names)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def text_only(source: Source, whole: StreamedModel) -> tuple[Source, TextCheckpoint]:
    """The language model of `whole`: a folder with its config and tokenizer, and its tensors.

    The folder lives as long as the checkpoint. Raises RequestError where there is nothing beside the language model,
    or transformers has no causal LM class for it.
    """
    config = _text_config(source, whole)
    text = model_on_meta(config, whole.dtype, trust_remote_code=False)
    checkpoint = TextCheckpoint(whole.checkpoint, _names(whole, text))
    folder = Path(tempfile.mkdtemp(prefix="prune-cli-text-only-"))
    weakref.finalize(checkpoint, shutil.rmtree, folder, ignore_errors=True)
    _link_side_files(source.folder, folder, {*whole.checkpoint.files, _CONFIG})
    config.save_pretrained(folder)
    return replace(source, folder=folder), checkpoint


def _text_config(source: Source, whole: StreamedModel) -> Any:
    """The language model's config, with what only the whole one says of it."""
    config = whole.config
    text = config.get_text_config()
    if text is config:
        raise RequestError(f"{source.given} is a language model and nothing beside: leave out --text-only.")
    of_text = AutoModelForCausalLM._model_mapping.get(type(text), None)
    if of_text is None or isinstance(of_text, tuple):
        raise RequestError(
            f"The language model of {source.given} is a {text.model_type}, for which transformers has no causal LM "
            "class: leave out --text-only."
        )
    text = type(text).from_dict(json.loads(text.to_json_string(use_diff=False)))
    text.architectures = [of_text.__name__]
    text.tie_word_embeddings = bool(whole.model.all_tied_weights_keys)
    text.dtype = config.dtype if text.dtype is None else text.dtype
    for key in ("bos_token_id", "eos_token_id"):
        if getattr(text, key, None) is None and hasattr(config, key):
            setattr(text, key, getattr(config, key))
    return text


def _names(whole: StreamedModel, text: Any) -> dict[str, str]:
    """The name of each tensor of the language model alone, extra heads with it -> its name in the whole checkpoint."""
    decoder = whole.model.get_decoder()
    paths = {module: path for path, module in whole.model.named_modules()}
    head = whole.model.get_output_embeddings()
    path, head_path = f"{paths[decoder]}.", f"{paths.get(head, ' ')}."
    tensors = whole.tensor_map
    inside = [name for name, info in tensors.items() if info.parameter is not None and info.parameter.startswith(path)]
    # Files spell the way to the decoder in their own manner, but all the same within one checkpoint.
    prefix = os.path.commonprefix(inside).rpartition(".")[0]  # noqa: RUF071 - names, not paths
    names = {f"{text.base_model_prefix}.{name.removeprefix(prefix).lstrip('.')}": name for name in inside}
    heads = [name for name, info in tensors.items() if info.head is not None]
    names |= {_name_of_head(name, prefix, text.base_model_prefix): name for name in heads}
    text_head = next(name for name, module in text.named_modules() if module is text.get_output_embeddings())
    for name, info in tensors.items():
        if info.parameter is not None and isinstance(head, nn.Module) and info.parameter.startswith(head_path):
            names[f"{text_head}.{info.parameter.removeprefix(head_path)}"] = name
    return names


def _name_of_head(name: str, prefix: str, base: str) -> str:
    """Heads lie in the decoder (`prefix`) or, with names of their own, beside it or at the root."""
    if name.startswith(f"{prefix}."):
        return base + name.removeprefix(prefix)
    return name.removeprefix(f"{prefix.rpartition('.')[0]}.")


def _link_side_files(whole: Path, folder: Path, left_out: set[str]) -> None:
    """Tokenizer, templates and so on, but nothing that prepares images or sound."""
    for path in whole.rglob("*"):
        name = str(path.relative_to(whole))
        if path.is_file() and name not in left_out and not name.endswith(_PROCESSORS):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path)
