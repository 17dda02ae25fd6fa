"""Extra heads and other tensors that transformers does not load: they stay, get their new numbers, and are listed."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from methods.structured.experts import choose
from prune_cli.model.extra_heads import counted_heads
from tests import reference_experts
from tests.broken import copy_of, refused
from tests.conftest import RunCommand, token_ids
from tests.heads import SHARD, Tensors, add, save_deepseek, save_qwen, tensors_of
from tests.packed_files import block_fp8, is_linear, pack_folder
from tests.tiny import load_plain, save_gpt2_without_prefix
from tests.tiny_wrappers import save_wrapper

HEAD = "model.layers.3."


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deepseek(tmp_path_factory.mktemp("heads") / "deepseek")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("heads") / "qwen")


def pruned(command: RunCommand, model: Path, out: Path, *arguments: object) -> Any:
    """The report of a run that must succeed."""
    outcome = command("prune", model, out, *arguments)
    assert outcome.code == 0, outcome.stderr
    return json.loads((out / "prune_report.json").read_text()) | {"printed": outcome.stdout + outcome.stderr}


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def of_head(tensors: Tensors, start: str) -> Tensors:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_weight_method_keeps_a_head_and_lists_it(deepseek: Path, tmp_path: Path, command: RunCommand) -> None:
    report = pruned(command, deepseek, tmp_path / "out", "-m", "magnitude")
    before = of_head(tensors_of(deepseek), HEAD)
    assert_same(of_head(tensors_of(tmp_path / "out"), HEAD), before)
    assert report["not_loaded"] == [
        {
            "name": "model.layers.3",
            "kind": "extra head",
            "tensors": len(before),
            "parameters": sum(tensor.numel() for tensor in before.values()),
            "bytes": sum(tensor.nbytes for tensor in before.values()),
            "became": "kept as it was",
        }
    ]
    shown = [(tmp_path / "out" / f"prune_report.{kind}").read_text() for kind in ("md", "html")]
    assert all("Not loaded by transformers" in text for text in (report["printed"], *shown))
    assert all("extra head" in text and "model.layers.3" in text for text in (report["printed"], *shown))


def test_include_names_a_head_and_prunes_its_maps(
    deepseek: Path, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    for name, more in (("free", ()), ("with text", ("--calibration", tokens_file))):
        out = tmp_path / name
        pruned(command, deepseek, out, "-m", "magnitude", "--include", f"{HEAD}*", *more)
        before, after = (of_head(tensors_of(folder), HEAD) for folder in (deepseek, out))
        for key, tensor in after.items():
            is_map = tensor.ndim == 2 and "mlp.gate.weight" not in key
            assert torch.equal(tensor, before[key]) != is_map, key
            assert not is_map or (tensor == 0).float().mean() == 0.5
    words = refused(command, deepseek, tmp_path / "out", "-m", "wanda", "--include", f"{HEAD}*")
    assert "no linear layer whose inputs could be measured (extra head)" in words


def test_depth_renumbers_a_head_behind_the_last_block(deepseek: Path, tmp_path: Path, command: RunCommand) -> None:
    arguments = ("-m", "depth", "-o", "which=1", "-o", "refit=none")
    report = pruned(command, deepseek, tmp_path / "out", *arguments)
    before, after = tensors_of(deepseek), tensors_of(tmp_path / "out")
    assert_same(of_head(after, "model.layers.2."), of_head(before, HEAD))
    assert_same(of_head(after, "model.layers.1."), of_head(before, "model.layers.2."))
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 2
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 1
    assert [each["became"] for each in report["not_loaded"]] == ["kept as model.layers.2"]
    gone = sum(tensor.numel() for tensor in of_head(before, "model.layers.1.").values())
    share = gone / sum(tensor.numel() for tensor in before.values())
    assert report["structure"]["removed_shares"]["parameters"] == pytest.approx(share)
    load_plain(tmp_path / "out")

    # The same once more, of that output: the class does not know the head's number, its config counts it.
    pruned(command, tmp_path / "out", tmp_path / "again", "-m", "depth", "-o", "which=0", "-o", "refit=none")
    assert_same(of_head(tensors_of(tmp_path / "again"), "model.layers.1."), of_head(before, HEAD))

    report = pruned(command, deepseek, tmp_path / "without", *arguments, "--drop-extra-heads")
    assert_same(
        tensors_of(tmp_path / "without"), {n: t for n, t in after.items() if not n.startswith("model.layers.2.")}
    )
    assert config_of(tmp_path / "without")["num_nextn_predict_layers"] == 0
    assert report["structure"]["removed_shares"]["parameters"] == pytest.approx(share)
    assert [each["became"] for each in report["not_loaded"]] == ["gone: left out by --drop-extra-heads"]


def test_depth_leaves_heads_with_names_of_their_own(qwen: Path, tmp_path: Path, command: RunCommand) -> None:
    report = pruned(command, qwen, tmp_path / "out", "-m", "depth", "-o", "which=1", "-o", "refit=none")
    assert_same(of_head(tensors_of(tmp_path / "out"), "mtp."), of_head(tensors_of(qwen), "mtp."))
    assert [(each["name"], each["became"]) for each in report["not_loaded"]] == [("mtp", "kept")]
    load_plain(tmp_path / "out")


def test_width_refuses_a_head_that_would_have_to_be_narrowed(
    deepseek: Path, tmp_path: Path, command: RunCommand
) -> None:
    arguments = ("-m", "width", "-o", "parts=heads", "-o", "score=magnitude", "-o", "refit=none", "-s", "0.5")
    words = refused(command, deepseek, tmp_path / "out", *arguments)
    assert f"{HEAD}self_attn." in words
    assert "of the extra head model.layers.3 has the width that config.json gives all blocks" in words
    pruned(command, deepseek, tmp_path / "out", *arguments, "--drop-extra-heads")
    assert not of_head(tensors_of(tmp_path / "out"), HEAD)


VALUE_HEAD = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
METHODS = {
    "magnitude": (),
    "depth": ("-o", "which=1", "-o", "refit=none"),
    "experts": ("-o", "score=random"),
    "width": ("-o", "parts=mlp", "-o", "score=magnitude", "-o", "refit=none", "-o", "multiple=1"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_value_head_is_copied_and_named(
    method: str, deepseek: Path, whole: Path, tmp_path: Path, command: RunCommand
) -> None:
    model = add(copy_of(deepseek if method == "experts" else whole, tmp_path / "model"), VALUE_HEAD)
    report = pruned(command, model, tmp_path / "out", "-m", method, *METHODS[method])
    assert_same(of_head(tensors_of(tmp_path / "out"), "v_head."), of_head(VALUE_HEAD, "v_head."))
    told = {each["name"]: (each["kind"], each["became"]) for each in report["not_loaded"]}
    for name in VALUE_HEAD:
        assert told[name][0] == "unknown to the class"
        assert told[name][1].startswith("kept")


def test_what_the_class_ignores_in_a_block_moves_with_it(tmp_path: Path, command: RunCommand) -> None:
    model = save_gpt2_without_prefix(tmp_path / "model")
    add(model, {f"h.{block}.attn.bias": torch.full((1, 1, 64, 64), float(block)) for block in range(3)})
    report = pruned(command, model, tmp_path / "out", "-m", "depth", "-o", "which=1", "-o", "refit=none")
    written = tensors_of(tmp_path / "out")
    assert [float(written[f"h.{block}.attn.bias"].mean()) for block in range(2)] == [0, 2]
    assert "h.2.attn.bias" not in written
    assert [(each["name"], each["kind"]) for each in report["not_loaded"]] == [
        ("h.*.attn.bias", "ignored by the class")
    ]


JOINS = {"deepseek": ("eh_proj", "enorm", "hnorm"), "qwen": ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}


@torch.no_grad()
def _scores_of_head(model: Path, scratch: Path, kind: str, start: str, block: int) -> list[float]:
    """By the whole model in plain transformers, and a second one that has the head's block in place of its last."""
    own, tensors = start + ("layers.0." if kind == "qwen" else ""), tensors_of(model)
    in_place = {f"model.layers.{block}.{rest}": tensor for rest, tensor in of_head(tensors, own).items()}
    names = tensors.keys() & in_place.keys()
    dense, other = load_plain(model), load_plain(add(copy_of(model, scratch), {name: in_place[name] for name in names}))
    ids = token_ids()
    last, embedded = dense.model(input_ids=ids).last_hidden_state, dense.model.embed_tokens(ids)
    join, *norms = (tensors[f"{start}{name}.weight"] for name in JOINS[kind])
    normed = []
    for weight, values in zip(norms, (embedded[:, 1:], last[:, :-1]), strict=True):
        norm = deepcopy(dense.model.norm)
        norm.weight.copy_(weight)
        normed.append(norm(values))
    layers: Any = other.model.layers
    for layer in layers[:block]:
        layer.forward = lambda hidden, *args, **kwargs: hidden
    experts = next(iter(reference_experts.experts_of(layers[block]).values()))
    calls: list[Any] = []
    experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    other.model(inputs_embeds=torch.cat(normed, -1) @ join.T, use_cache=False)
    return reference_experts.removal_scores(experts, calls, "reap")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "start", "block", "groups"), [("deepseek", HEAD, 2, 2), ("qwen", "mtp.", 3, 1)])
def test_experts_leaves_a_head_as_many_by_its_own_inputs(
    kind: str, start: str, block: int, groups: int, request: pytest.FixtureRequest, tmp_path: Path, tokens_file: Path,
    command: RunCommand,
) -> None:  # fmt: skip
    model: Path = request.getfixturevalue(kind)
    values = torch.tensor(_scores_of_head(model, tmp_path / "scratch", kind, start, block))
    arguments = ("-m", "experts", "-s", "0.5", "--calibration", tokens_file, "--batch-size", "4")
    planned = command("prune", model, tmp_path / "out", *arguments, "--dry-run", "--json").json
    half = f"{len(values) // 2} of its {len(values)} experts"
    assert [each["became"] for each in planned["not_loaded"]] == [f"kept, without {half}"]
    report = pruned(command, model, tmp_path / "out", *arguments)
    kept = choose(values, len(values) // 2, groups)
    gone = [str(expert) for expert in range(len(values)) if expert not in kept]
    assert [each["became"] for each in report["not_loaded"]] == [f"kept, without its experts {', '.join(gone)}"]
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    mlp = f"{start}mlp." if kind == "deepseek" else f"{start}layers.0.mlp."
    assert torch.equal(after[f"{mlp}gate.weight"], before[f"{mlp}gate.weight"][kept])
    for new, old in enumerate(kept):
        for name in ("gate_proj", "up_proj", "down_proj"):
            written = after[f"{mlp}experts.{new}.{name}.weight"]
            assert torch.equal(written, before[f"{mlp}experts.{old}.{name}.weight"])
    assert f"{mlp}experts.{len(kept)}.up_proj.weight" not in after
    assert "every other runtime" in report["gain"]


def test_experts_keeps_a_head_whole_that_it_cannot_run(deepseek: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(deepseek, tmp_path / "model")
    tensors = tensors_of(model)
    del tensors[f"{HEAD}enorm.weight"]
    save_file(tensors, model / SHARD, metadata={"format": "pt"})
    arguments = ("-m", "experts", "-s", "0.5", "-o", "score=random")
    report = pruned(command, model, tmp_path / "out", *arguments)
    assert_same(of_head(tensors_of(tmp_path / "out"), HEAD), of_head(tensors, HEAD))
    assert "The extra head model.layers.3 keeps all of its experts, and config.json now says 4" in report["printed"]
    assert "every other runtime" not in report["gain"]
    pruned(command, model, tmp_path / "without", *arguments, "--drop-extra-heads")
    assert not of_head(tensors_of(tmp_path / "without"), HEAD)
    assert config_of(tmp_path / "without")["num_nextn_predict_layers"] == 0


def test_a_packed_head_stays_packed_and_listed(deepseek: Path, tmp_path: Path, command: RunCommand) -> None:
    plain = f"{HEAD}eh_proj"
    scheme = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": [plain]}
    model = pack_folder(
        deepseek, tmp_path / "model", block_fp8(16), scheme, lambda name, t: is_linear(name, t) and plain not in name
    )
    arguments = ("-m", "depth", "-o", "which=1")
    report = pruned(command, model, tmp_path / "out", *arguments)
    before, after = (of_head(tensors_of(f), s) for f, s in ((model, HEAD), (tmp_path / "out", "model.layers.2.")))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
    assert [each["bytes"] for each in report["not_loaded"]] == [sum(tensor.nbytes for tensor in before.values())]
    assert config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"] == ["model.layers.2.eh_proj"]
    pruned(command, model, tmp_path / "without", *arguments, "--drop-extra-heads")
    assert config_of(tmp_path / "without")["quantization_config"]["modules_to_not_convert"] == []


@pytest.mark.filterwarnings("ignore")
def test_a_head_goes_with_the_language_model_of_a_wrapper(tmp_path: Path, command: RunCommand) -> None:
    model = save_wrapper(tmp_path / "model", "qwen3_5_moe", shards=False)
    config = config_of(model)
    blocks = config["text_config"]["layer_types"]
    like = f"model.language_model.layers.{len(blocks) - 1 - blocks[::-1].index('full_attention')}."
    head = {f"mtp.layers.0.{name}": tensor + 0.01 for name, tensor in of_head(tensors_of(model), like).items()}
    add(model, head)
    (model / "config.json").write_text(
        json.dumps(config | {"text_config": config["text_config"] | {"mtp_num_hidden_layers": 1}})
    )
    report = pruned(command, model, tmp_path / "out", "-m", "magnitude", "--text-only")
    assert_same(of_head(tensors_of(tmp_path / "out"), "mtp."), of_head(head, "mtp."))
    assert [(each["name"], each["kind"]) for each in report["not_loaded"]] == [("mtp", "extra head")]
    arguments = ("-m", "depth", "-o", "which=0", "-o", "refit=none", "--drop-extra-heads")
    pruned(command, model, tmp_path / "without", *arguments)
    assert config_of(tmp_path / "without")["text_config"]["mtp_num_hidden_layers"] == 0
    assert not of_head(tensors_of(tmp_path / "without"), "mtp.")


def test_a_config_may_have_numbers_for_keys() -> None:
    """As Aria's has, which counts the queries for an image of so many patches."""
    assert counted_heads({"patches": {1225: 128, 4900: 256}, "text": {"num_nextn_predict_layers": 2}}) == 2
