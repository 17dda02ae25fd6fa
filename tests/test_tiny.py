import json
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.tiny import ARCHITECTURES, VOCABULARY, load_plain, save_gpt2_without_prefix, save_tiny


def _tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def _in_features(model: nn.Module) -> dict[str, int]:
    features: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            features[name] = module.in_features
        elif isinstance(module, Conv1D):
            features[name] = module.nx
    return features


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoint_loads_whole_and_answers(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", architecture)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 3

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, loading = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    assert not any(loading.values()), loading

    with torch.no_grad():
        logits = model.eval()(_tokens()).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.05
    assert (logits[:, 1:] - logits[:, :-1]).abs().amax(-1).min() > 0.05

    features = _in_features(model)
    assert len(features) > 6
    assert {name: width for name, width in features.items() if width % 8} == {}
    _tokenizer_reads_back_the_same(folder)


def _tokenizer_reads_back_the_same(folder: Path) -> None:
    """The class that transformers loads depends on the kind of model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Prune 2:4,\n\tthen  look."
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokens) == len(text)
    assert min(tokens) > 2
    assert max(tokens) < VOCABULARY
    assert tokenizer.decode(tokens) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_same_seed_gives_the_same_bytes_and_leaves_the_callers_randomness_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    files = [
        save_tiny(tmp_path / name, "gpt2", seed=seed, shards=False, tokenizer=False) / "model.safetensors"
        for name, seed in (("one", 0), ("two", 0), ("three", 1))
    ]
    one, two, three = (file.read_bytes() for file in files)
    assert one == two != three
    assert torch.equal(torch.random.get_rng_state(), before)


def test_half_precision_is_what_lies_on_disk(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama-tied", dtype=torch.bfloat16, shards=False, num_hidden_layers=2)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert load_plain(folder, torch.bfloat16).config.num_hidden_layers == 2


def test_gpt2_without_prefix_is_the_same_model(tmp_path: Path) -> None:
    plain = load_plain(save_tiny(tmp_path / "plain", "gpt2", shards=False))
    bare = load_plain(save_gpt2_without_prefix(tmp_path / "bare"))
    with safe_open(tmp_path / "bare" / "model.safetensors", "pt") as file:
        assert not any(name.startswith(("transformer.", "lm_head.")) for name in file.keys())  # noqa: SIM118
    with torch.no_grad():
        assert torch.equal(plain(_tokens()).logits, bare(_tokens()).logits)
