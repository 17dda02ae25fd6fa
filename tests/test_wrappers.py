"""Language models inside vision and audio models: they alone are pruned, and the whole loads as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from prune_cli.model.architecture import find_blocks
from tests import reference
from tests.conftest import RunCommand, token_ids
from tests.tiny_wrappers import WRAPPERS, save_wrapper


def load(folder: Path) -> Any:
    model, told = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", WRAPPERS)
@torch.no_grad()
def test_only_the_language_model_is_pruned_as_in_memory(
    kind: str, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    folder, out = save_wrapper(tmp_path / "model", kind), tmp_path / "out"
    outcome = command(
        "prune", folder, out, "--calibration", tokens_file, "--eval", tokens_file, "--calibrate-by", "block", "-q"
    )
    assert outcome.code == 0, outcome.stderr

    whole = load(folder)
    name, blocks = find_blocks(whole)
    reference.prune_whole_model(
        whole, list(blocks), [token_ids()], reference.wanda_score, lambda s: reference.keep_per_row(s, 0.5), by="block"
    )
    pruned, expected = load(out), whole.state_dict()
    assert type(pruned) is type(whole)
    for parameter, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, expected[parameter]), parameter
    assert sum(int((p == 0).sum()) for n, p in pruned.named_parameters() if n.startswith(name)) > 0
    report = json.loads((out / "prune_report.json").read_text())
    assert report["evaluation"]["after"]["perplexity"] == pytest.approx(
        reference.perplexity(whole, token_ids()), rel=1e-5
    )
    before, after = tensors_of(folder), tensors_of(out)
    assert before.keys() == after.keys()
    pruned_names = {t["name"] for t in report["tensors"] if t["action"] == "pruned"}
    assert all(torch.equal(before[n], after[n]) for n in before if n not in pruned_names)
    assert not any(part in n for n in pruned_names for part in ("vision", "visual", "projector", "connector", "audio"))
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["qwen3_vl", "mistral3", "paligemma"])
@torch.no_grad()
def test_depth_gives_the_whole_without_a_block(
    kind: str, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    folder, out = save_wrapper(tmp_path / "model", kind), tmp_path / "out"
    outcome = command("prune", folder, out, "-m", "depth", "-o", "which=1", "-o", "refit=none", "-q")
    assert outcome.code == 0, outcome.stderr
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    assert after["text_config"]["num_hidden_layers"] == 2
    assert without(before, "num_hidden_layers", "layer_types") == without(after, "num_hidden_layers", "layer_types")

    whole = load(folder)
    _, blocks = find_blocks(whole)
    blocks[1].forward = lambda hidden_states, *_, **__: hidden_states
    ids = token_ids()
    assert torch.equal(load(out)(input_ids=ids).logits, whole(input_ids=ids, use_cache=False).logits)
    same_beside_the_decoder(folder, out)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
@torch.no_grad()
def test_width_narrows_the_language_model(kind: str, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    folder, out = save_wrapper(tmp_path / "model", kind), tmp_path / "out"
    if kind == "qwen2_5_vl":
        lay_flat(folder / "config.json")
    data = ("--calibration", tokens_file, "--eval", tokens_file)
    outcome = command("prune", folder, out, "-m", "width", *data, "-o", "parts=mlp", "-o", "multiple=8", "-q")
    assert outcome.code == 0, outcome.stderr
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    text = after.get("text_config", after)
    assert text["intermediate_size"] == 48
    assert without(before, "intermediate_size") == without(after, "intermediate_size")
    said = json.loads((out / "prune_report.json").read_text())["evaluation"]["after"]["perplexity"]
    assert said == pytest.approx(reference.perplexity(load(out), token_ids()), rel=1e-5)
    same_beside_the_decoder(folder, out)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The config but for `keys` of the language model."""
    text = {key: value for key, value in config.get("text_config", config).items() if key not in keys}
    return {**config, "text_config": text} if "text_config" in config else text


def lay_flat(path: Path) -> None:
    """The first Qwen2-VL and Qwen2.5-VL have the keys of the language model among those of the whole."""
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    path.write_text(json.dumps({**text, **config}))


def same_beside_the_decoder(folder: Path, out: Path) -> None:
    before, after = tensors_of(folder), tensors_of(out)
    beside = {name for name in before if any(part in name for part in ("visual", "vision", "projector"))}
    assert beside
    assert all(torch.equal(before[name], after[name]) for name in beside)


def test_what_needs_an_image_is_refused(tmp_path: Path, command: RunCommand) -> None:
    save_wrapper(tmp_path / "model", "llava")
    for model_type, architecture, message in (
        ("blip-2", "Blip2ForConditionalGeneration", "does not run on text alone"),
        ("t5gemma2", "T5Gemma2ForConditionalGeneration", "no causal language model"),
    ):
        config = {"model_type": model_type, "architectures": [architecture]}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        outcome = command("prune", tmp_path / "model", tmp_path / "out", "-m", "magnitude")
        assert outcome.code == 2
        assert message in outcome.stderr
