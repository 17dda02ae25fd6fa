"""Language models inside vision and audio models: they alone are pruned, and the whole loads as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

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


class SeeingImages:
    """A model in memory that is called with token ids alone, and gets the images that belong to them."""

    def __init__(self, model: Any, samples: list[dict[str, torch.Tensor]]) -> None:
        self.model, self.samples = model, samples

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return self.model(**next(each for each in self.samples if torch.equal(each["input_ids"], input_ids)))


def samples_with_images(kind: str, config: Any) -> list[dict[str, torch.Tensor]]:
    """Three samples of two lengths, of four image tokens and some text each, as a processor would make them."""
    random, samples = torch.Generator().manual_seed(0), []
    for number, length in enumerate((10, 14, 10)):
        image = torch.full((1, 4), config.image_token_id)
        ids = torch.cat([image, token_ids(seed=number, samples=1, length=length)], 1)
        if kind == "llava":
            beside = {"pixel_values": torch.randn(1, 3, 16, 16, generator=random)}
        else:
            patches = torch.randn(16, 3 * 2 * 8 * 8, generator=random)
            beside = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
            beside["mm_token_type_ids"] = (ids == config.image_token_id).to(torch.int64)
        samples.append({"input_ids": ids, **beside})
    return samples


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_images_are_seen_where_samples_hold_them(kind: str, tmp_path: Path, command: RunCommand) -> None:
    folder, out, data = save_wrapper(tmp_path / "model", kind), tmp_path / "out", tmp_path / "samples"
    whole = load(folder)
    samples = samples_with_images(kind, whole.config)
    data.mkdir()
    for number, sample in enumerate(samples):
        save_file(sample, data / f"{number}.safetensors")
    outcome = command(
        "prune", folder, out, "--calibration", data, "--eval", data, "--calibrate-by", "block", "-q", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    _, blocks = find_blocks(whole)
    seeing = SeeingImages(whole, samples)
    reference.prune_whole_model(
        seeing,
        list(blocks),
        [sample["input_ids"] for sample in samples],
        reference.wanda_score,
        lambda scores: reference.keep_per_row(scores, 0.5),
        by="block",
    )
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(out).state_dict().items())
    losses = [
        torch.nn.functional.cross_entropy(seeing(each["input_ids"]).logits[0, :-1], each["input_ids"][0, 1:])
        * (each["input_ids"].shape[1] - 1)
        for each in samples
    ]
    tokens = sum(each["input_ids"].shape[1] - 1 for each in samples)
    assert outcome.json["evaluation"]["after"]["loss"] == pytest.approx(float(sum(losses)) / tokens, rel=1e-5)
    assert not any("text alone" in warning for warning in outcome.json["warnings"])


def test_what_a_model_does_not_take_is_left_out_and_told(tmp_path: Path, command: RunCommand) -> None:
    folder = save_wrapper(tmp_path / "model", "llava")
    save_file({"input_ids": token_ids(), "pixel_value": torch.zeros(6, 3)}, tmp_path / "a.safetensors")
    outcome = command("prune", folder, tmp_path / "out", "--calibration", tmp_path / "a.safetensors", "-q", "--json")
    assert any("pixel_value, which LlavaForConditionalGeneration does not take" in w for w in outcome.json["warnings"])
    assert any("Calibrated with text alone" in warning for warning in outcome.json["warnings"])
    save_file({"input_ids": token_ids(), "pixel_values": torch.zeros(3, 3, 16, 16)}, tmp_path / "b.safetensors")
    refused = command("prune", folder, tmp_path / "no", "--calibration", tmp_path / "b.safetensors")
    assert refused.code == 2
    assert "pixel_values in " in refused.stderr
    assert "or a file for each sample in a folder" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen3_5_moe", "idefics3"])
@torch.no_grad()
def test_the_language_model_alone(kind: str, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    folder, out = save_wrapper(tmp_path / "model", kind), tmp_path / "out"
    (folder / "preprocessor_config.json").write_text("{}")
    outcome = command("prune", folder, out, "--calibration", tokens_file, "--text-only", "-s", "0", "-q")
    assert outcome.code == 0, outcome.stderr
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    alone, told = loaded
    assert not any(told[trouble] for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = token_ids()
    assert torch.equal(alone.eval()(input_ids=ids).logits, load(folder)(input_ids=ids).logits)
    assert (out / "tokenizer.json").exists()
    assert not (out / "preprocessor_config.json").exists()
    assert len(tensors_of(out)) < len(tensors_of(folder))


def test_a_part_of_the_language_model_alone(tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    """A structured output begins from it as from any other model; sparse files too."""
    folder = save_wrapper(tmp_path / "model", "llava")
    data = ("--calibration", tokens_file, "--text-only", "-q")
    depth = command("prune", folder, tmp_path / "depth", "-m", "depth", "-o", "which=1", *data)
    assert depth.code == 0, depth.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "depth").config.num_hidden_layers == 2
    sparse = command("prune", folder, tmp_path / "sparse", "--format", "sparse", *data)
    assert sparse.code == 0, sparse.stderr
    dense = command("prune", folder, tmp_path / "dense", *data)
    assert dense.code == 0, dense.stderr
    assert command("convert", tmp_path / "sparse", tmp_path / "again", "--format", "dense", "-q").code == 0
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "dense").keys()


def test_where_there_is_no_language_model_to_take_out(tmp_path: Path, llama: Path, command: RunCommand) -> None:
    alone = command("prune", llama, tmp_path / "out", "-m", "magnitude", "--text-only")
    assert (alone.code, "is a language model and nothing beside" in alone.stderr) == (2, True)
    folder = save_wrapper(tmp_path / "model", "qwen3_vl")
    unknown = command("prune", folder, tmp_path / "out", "-m", "magnitude", "--text-only")
    assert unknown.code == 2
    assert "transformers has no causal LM class" in " ".join(unknown.stderr.split())
