"""What cannot be pruned as it is: each refused in one sentence that says why, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import save_file

from tests.broken import SHARD, change_config, copy_of, refused
from tests.conftest import RunCommand, token_ids
from tests.forked import ForkedRun
from tests.tiny import save_tiny

# --- what is no checkpoint of the right kind ----------------------------------------------------------------------


FOLDERS: dict[str, tuple[list[str], str]] = {
    "pickle": (["config.json", "pytorch_model.bin"], "holds pickled weights only (pytorch_model.bin)"),
    "sharded pickle": (["config.json", "pytorch_model-00001-of-00002.bin"], "holds pickled weights only"),
    "GGUF": (["model-q4_0.gguf"], "holds GGUF (model-q4_0.gguf)"),
    "GGUF beside a config": (["config.json", "model.gguf"], "holds GGUF (model.gguf)"),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "holds a PEFT adapter"),
    "empty": ([], "has neither model.safetensors nor model.safetensors.index.json"),
    "other safetensors": (["config.json", "weights.safetensors"], "has neither model.safetensors nor"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_without_usable_weights(kind: str, tmp_path: Path, command: RunCommand) -> None:
    files, words = FOLDERS[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"{}")
    message = refused(command, folder, tmp_path / "out")
    assert words in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.gguf", "is GGUF: give the folder of the safetensors checkpoint"),
        ("pytorch_model.bin", "is a file: give the folder"),
        ("model.safetensors", "is a file: give the folder"),
    ],
)
def test_a_file_in_place_of_a_folder(name: str, words: str, tmp_path: Path, command: RunCommand) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert words in refused(command, tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("./nowhere", "./nowhere is not there"),
        ("/nowhere/at/all", "/nowhere/at/all is not there"),
        ("a/b/c", "a/b/c is not there"),
        ("two words", "two words is not there"),
        ("", "MODEL is an empty name"),
    ],
)
def test_a_model_that_is_not_there(given: str, words: str, tmp_path: Path, command: RunCommand) -> None:
    assert words in refused(command, given, tmp_path / "out")


def test_a_revision_of_a_local_folder(whole: Path, tmp_path: Path, command: RunCommand) -> None:
    assert "--revision is for models of the hub" in refused(command, whole, tmp_path / "out", "--revision", "main")


# --- config.json --------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "is already quantised (gptq)"),
    "quantised somehow": ({"quantization_config": [1]}, "is already quantised (unknown)"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
    "unknown type": ({"model_type": "nonsense"}, "the model type 'nonsense', which transformers"),
    "no type": ({"model_type": None}, "the model type None"),
    "type of a wrong kind": ({"model_type": ["llama"]}, "model_type = ['llama'], expected a text"),
    "architectures of a wrong kind": ({"architectures": {"a": 1}}, "architectures = {'a': 1}, expected a list"),
    "auto_map of a wrong kind": ({"auto_map": ["AutoModel"]}, "auto_map = ['AutoModel'], expected an object"),
    "classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "is LlamaForSequenceClassification, no",
    ),
    "bare model": ({"architectures": ["LlamaModel"]}, "is LlamaModel, no causal language model"),
    "no blocks": ({"num_hidden_layers": 0}, "has no list of decoder blocks"),
    "heads that do not divide": ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    "no heads": ({"num_attention_heads": 0}, "config.json is refused by transformers (integer modulo by zero)"),
    "width as text": ({"hidden_size": "x"}, "Field 'hidden_size' expected int, got str"),
    "negative width": ({"hidden_size": -32, "num_attention_heads": 4}, "config.json"),
    "unknown activation": ({"hidden_act": "nonsense"}, "describes no model that transformers can build"),
    "unknown rope": ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1.0}}, "describes no model"),
    "unknown dtype": ({"dtype": "nonsense"}, "config.json is refused by transformers"),
    "another width": ({"hidden_size": 48}, "has shape [128, 32] but config.json describes [128, 48]"),
    "another vocabulary": ({"vocab_size": 64}, "has shape [128, 32] but config.json describes [64, 32]"),
    "huge": ({"vocab_size": 10**13}, "config.json describes [10000000000000, 32]"),
    "more blocks": ({"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight is not in the checkpoint"),
    "a billion blocks": ({"num_hidden_layers": 10**9}, "describes 1000000000 blocks (num_hidden_layers), but the"),
    "fewer blocks": ({"num_hidden_layers": 2}, "has 9 tensors unknown to the model (the first is model.layers.2."),
    "own code": ({"model_type": "x", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "add --trust-remote-code"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_that_do_not_do(kind: str, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    changes, words = CONFIGS[kind]
    message = refused(command, change_config(copy_of(whole, tmp_path / "model"), **changes), tmp_path / "out")
    assert words in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no config.json"),
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe\x00", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"[1]", "config.json is no JSON object"),
    ],
)
def test_unreadable_config(content: bytes | None, words: str, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(whole, tmp_path / "model")
    (model / "config.json").unlink() if content is None else (model / "config.json").write_bytes(content)
    assert words in refused(command, model, tmp_path / "out")


def test_blocks_that_the_config_leaves_out_are_kept_on_request(
    whole: Path, tmp_path: Path, command: RunCommand
) -> None:
    model = change_config(copy_of(whole, tmp_path / "model"), num_hidden_layers=2)
    run = command("prune", model, tmp_path / "out", "-m", "magnitude", "--allow-unsupported", "--json")
    assert run.code == 0
    kept = {t["name"] for t in run.json["tensors"] if t["action"] == "kept" and t["role"] == "unknown"}
    assert len(kept) == 9
    assert all(name.startswith("model.layers.2.") for name in kept)


_SMALL: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL |= {"intermediate_size": 64, "max_position_embeddings": 64}
_HALF = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
_CLIP = {
    "text_config": {**_HALF, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    "vision_config": {**_HALF, "image_size": 16, "patch_size": 8},
}
_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
NOT_CAUSAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "masked": ("BertForMaskedLM", _SMALL, "is BertForMaskedLM, no causal language model"),
    "reads both ways": ("BertLMHeadModel", _SMALL, "this BertLMHeadModel is no decoder"),
    "encoder and decoder": ("T5ForConditionalGeneration", _T5, "is T5ForConditionalGeneration, no causal"),
    "images": ("CLIPModel", _CLIP, "is CLIPModel, no causal language model"),
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_models_that_do_not_write_text_left_to_right(kind: str, tmp_path: Path, command: RunCommand) -> None:
    name, settings, words = NOT_CAUSAL[kind]
    model_class = getattr(transformers, name)
    model_class(model_class.config_class(**settings)).save_pretrained(tmp_path / "model")
    assert words in refused(command, tmp_path / "model", tmp_path / "out")


def test_a_bert_that_is_a_decoder_is_pruned(tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    config = transformers.BertConfig(**_SMALL, is_decoder=True)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "model")
    assert command("prune", tmp_path / "model", tmp_path / "out", "--calibration", tokens_file, "-q").code == 0


# --- code that the checkpoint brings ------------------------------------------------------------------------------

_OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def _with_own_code(whole: Path, folder: Path, code: str) -> Path:
    auto_map = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    change_config(copy_of(whole, folder), model_type="odd", auto_map=auto_map, architectures=["OddForCausalLM"])
    (folder / "modeling_odd.py").write_text(code)
    return folder


def test_own_code_runs_only_with_the_flag(whole: Path, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    trap = tmp_path / "it-ran"
    model = _with_own_code(whole, tmp_path / "model", f"open({str(trap)!r}, 'w').close()\n{_OWN_CODE}")
    assert "brings its own code: read it" in refused(command, model, tmp_path / "out")
    assert not trap.exists()

    arguments = ["--calibration", tokens_file, "--batch-size", 2, "-q"]
    home = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    process = ForkedRun("prune", model, tmp_path / "out", *arguments, "--trust-remote-code", env=home)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert trap.exists()
    assert (tmp_path / "out" / "modeling_odd.py").read_bytes() == (model / "modeling_odd.py").read_bytes()
    assert command("prune", whole, tmp_path / "same", *arguments).code == 0
    assert (tmp_path / "out" / SHARD).read_bytes() == (tmp_path / "same" / SHARD).read_bytes()


@pytest.mark.parametrize(
    ("code", "words"), [("import nothing_like_it", "nothing_like_it"), ("raise LookupError('odd one')", "odd one")]
)
def test_own_code_that_fails(
    code: str, words: str, whole: Path, tmp_path: Path, command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = _with_own_code(whole, tmp_path / "model", code)
    message = refused(command, model, tmp_path / "out", "--trust-remote-code")
    assert words in message
    assert "config.json is refused by transformers" in message


# --- text ---------------------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer(whole: Path, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    model = copy_of(whole, tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    for option in ("--calibration", "--eval"):
        message = refused(command, model, tmp_path / "out", "-m", "magnitude", option, "builtin")
        assert "has no tokenizer, which builtin needs" in message
    assert command("prune", model, tmp_path / "blind", "-m", "magnitude", "-q").code == 0
    assert command("prune", model, tmp_path / "tokens", "--calibration", tokens_file, "-q").code == 0


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"version": "1.0", "model": {"type": "BPE"}, "added_tokens": []}'])
def test_a_damaged_tokenizer(content: bytes, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(whole, tmp_path / "model")
    (model / "tokenizer.json").write_bytes(content)
    message = refused(command, model, tmp_path / "out", "--calibration", "builtin")
    assert f"The tokenizer in {model} cannot be loaded" in message


def test_samples_longer_than_the_model_takes(tmp_path: Path, command: RunCommand) -> None:
    model, tokens = save_tiny(tmp_path / "model", "gpt2"), tmp_path / "long.safetensors"
    save_file({"input_ids": token_ids(samples=2, length=65)}, tokens)
    for option in ("--calibration", "--eval"):
        message = refused(command, model, tmp_path / "out", "-m", "magnitude", option, tokens)
        assert "holds samples of 65 tokens, but the model takes at most 64 positions" in message


def test_a_model_whose_own_code_fails(tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", "deepseek_v3", shards=False, tokenizer=False, num_key_value_heads=2)
    result = command("prune", model, tmp_path / "out", "--calibration", tokens_file, "-q")
    assert result.code == 1
    assert "The code of DeepseekV3ForCausalLM fails on this text (The size of tensor a" in result.stderr
