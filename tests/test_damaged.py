"""Damaged weights: cut, overlapping, mislabelled or not finite. Each is refused by name, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.broken import INDEX, SHARD, change_index, copy_of, join_shard, refused, split_shard, tensor_names
from tests.conftest import RunCommand

# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.00002, 0.0001, 0.01, 0.0203, 0.5, 0.999999])
def test_a_truncated_file(share: float, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(whole, tmp_path / "model")
    content = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(content[: int(share * len(content))])
    message = refused(command, model, tmp_path / "out")
    assert f"{model / SHARD} is truncated or" in message
    assert "download it again" in message


@pytest.mark.parametrize("shard", [0, 1, 4])
def test_a_truncated_shard(shard: int, llama: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(llama, tmp_path / "model")
    path = sorted(model.glob("*.safetensors"))[shard]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is truncated or damaged: its header needs" in refused(command, model, tmp_path / "out")


def test_a_missing_shard(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(llama, tmp_path / "model")
    path = sorted(model.glob("*.safetensors"))[2]
    path.unlink()
    assert f"{path} is missing though {INDEX} names it" in refused(command, model, tmp_path / "out")


CONTENTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "bytes at the end": (lambda content: content + b"\0", "is truncated or damaged: its header needs"),
    "absurd header length": (lambda content: b"\xff" * 8 + content[8:], "its header asks for 18446744073709551615"),
    "header beyond the file": (lambda content: (10**8 - 1).to_bytes(8, "little") + content[8:], "asks for 99999999"),
    "a web page": (lambda _: b"<!DOCTYPE html><html>not found</html>", "is truncated or no safetensors file"),
    "a pointer of git-lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
    "a zip file": (lambda content: b"PK\x03\x04\0\0\0\0" + content, "no safetensors file"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_that_holds_something_else(kind: str, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    change, words = CONTENTS[kind]
    model = copy_of(whole, tmp_path / "model")
    (model / SHARD).write_bytes(change((model / SHARD).read_bytes()))
    message = refused(command, model, tmp_path / "out")
    assert words in message
    assert str(model / SHARD) in message


# --- headers ------------------------------------------------------------------------------------------------------

FIELDS: dict[str, tuple[Any, str]] = {
    "out of range": ({"data_offsets": [10**9, 10**9 + 16384]}, "overlaps another tensor or leaves a hole"),
    "negative offsets": ({"data_offsets": [-16384, 0]}, "data_offsets [-16384, 0]"),
    "backwards": ({"data_offsets": [32768, 16384]}, "has -16384 bytes for shape [128, 32] of F32"),
    "beyond 64 bits": ({"data_offsets": [0, 10**400]}, "data_offsets [0, 10"),
    "fractions": ({"data_offsets": [0.5, 16384.5]}, "data_offsets [0.5, 16384.5]"),
    "one offset": ({"data_offsets": [0]}, "data_offsets [0]"),
    "offsets as text": ({"data_offsets": "ab"}, "data_offsets 'ab'"),
    "no offsets": ({"data_offsets": None}, "data_offsets None"),
    "negative shape": ({"shape": [-128, -32]}, "the shape [-128, -32]"),
    "shape of truths": ({"shape": [True, 4096]}, "the shape [True, 4096]"),
    "shape of many": ({"shape": [10**5] * 5000}, "the shape [100000, 100000, "),
    "no shape": ({"shape": None}, "the shape None"),
    "another shape": ({"shape": [128, 31]}, "has 16384 bytes for shape [128, 31] of F32"),
    "another dtype": ({"dtype": "F16"}, "has 16384 bytes for shape [128, 32] of F16"),
    "unknown dtype": ({"dtype": "F12"}, "the unknown dtype 'F12'"),
    "dtype of a wrong kind": ({"dtype": ["F32"]}, "the unknown dtype ['F32']"),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_of_a_tensor_that_do_not_fit(kind: str, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    fields, words = FIELDS[kind]
    model = copy_of(whole, tmp_path / "model")
    header, data = split_shard(model / SHARD)
    header["model.embed_tokens.weight"] |= fields
    join_shard(model / SHARD, header, data)
    message = refused(command, model, tmp_path / "out")
    assert words in message
    assert str(model / SHARD) in message
    assert command("inspect", model).code == 2


def _overlap(header: dict[str, Any]) -> None:
    first, second, *_ = tensor_names(header)
    header[second]["data_offsets"] = header[first]["data_offsets"]


def _twice(header: dict[str, Any]) -> str:
    name = tensor_names(header)[1]
    return f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], str | None], str]] = {
    "overlap": (_overlap, "overlaps another tensor or leaves a hole"),
    "a name twice": (_twice, "it has 'model.embed_tokens.weight' twice"),
    "a hole": (lambda header: header.pop(tensor_names(header)[3]) and None, "leaves a hole at byte"),
    "a list": (lambda _: "[]", "it is no JSON object"),
    "no JSON": (lambda _: "weights", "has a damaged header"),
    "too deep": (lambda _: "[" * 100_000, "has a damaged header"),
    "no tensors": (lambda _: "{}", "is truncated or damaged"),
    "an entry that is none": (lambda header: header.update({"lm_head.weight": None}), "lm_head.weight has no dtype"),
    "metadata of a wrong kind": (lambda header: header.update({"__metadata__": {"a": 1}}), "refused by safetensors"),
    "escapes in a name": (lambda header: header.update({"\x1b[31m": {}}), r"the name '\x1b[31m' is not printable"),
    "half a character": (lambda header: json.dumps(header).replace("lm_head", "\\ud800"), "is not printable"),
    "a number of many digits": (lambda _: '{"a": ' + "9" * 5000 + "}", "has a damaged header"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_damaged_headers(kind: str, whole: Path, tmp_path: Path, command: RunCommand) -> None:
    change, words = HEADERS[kind]
    model = copy_of(whole, tmp_path / "model")
    header, data = split_shard(model / SHARD)
    join_shard(model / SHARD, change(header) or header, data)
    message = refused(command, model, tmp_path / "out")
    assert words in message
    assert str(model / SHARD) in message


# --- the index ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "a\\b.safetensors", "..", ""])
def test_an_index_that_leads_outside(file: str, llama: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(llama, tmp_path / "model")
    (model / "sub").mkdir()
    for place in (model / "sub", tmp_path):
        save_file({"lm_head.weight": torch.ones(128, 32)}, place / "x.safetensors")
    message = refused(command, change_index(model, {"lm_head.weight": file}), tmp_path / "out")
    assert f"names the file {file!r} outside the folder" in message


@pytest.mark.parametrize("file", ["config.json", "x" * 300 + ".safetensors", "a\0b.safetensors", "\ud800.safetensors"])
def test_an_index_that_names_no_shard(file: str, llama: Path, tmp_path: Path, command: RunCommand) -> None:
    model = change_index(copy_of(llama, tmp_path / "model"), {"lm_head.weight": file})
    assert "expected a *.safetensors" in refused(command, model, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no index of a checkpoint"),
        ("[" * 100_000, "is no index of a checkpoint"),
        ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "it has 'a' twice"),
        ('{"weight_map": {}}', "has no usable weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "has no usable weight_map"),
        ('{"weight_map": {"a": 1}}', "has no usable weight_map"),
        ("{}", "has no usable weight_map"),
        ("[]", "has no usable weight_map"),
    ],
)
def test_an_index_that_is_none(text: str, words: str, llama: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(llama, tmp_path / "model")
    (model / INDEX).write_text(text)
    message = refused(command, model, tmp_path / "out")
    assert words in message
    assert str(model / INDEX) in message


def test_an_index_that_disagrees_with_the_shards(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    weight_map = json.loads((llama / INDEX).read_text())["weight_map"]
    elsewhere = next(file for file in weight_map.values() if file != weight_map["lm_head.weight"])
    model = change_index(copy_of(llama, tmp_path / "model"), {"lm_head.weight": elsewhere})
    message = refused(command, model, tmp_path / "out")
    assert f"{INDEX} says that lm_head.weight is in {elsewhere}, but it is not there" in message


def test_a_needed_tensor_that_is_in_no_shard(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(llama, tmp_path / "model")
    shard = model / json.loads((model / INDEX).read_text())["weight_map"]["lm_head.weight"]
    tensors = load_file(shard)
    del tensors["lm_head.weight"]
    save_file(tensors, shard)
    message = refused(command, model, tmp_path / "out")
    assert f"{INDEX} says that lm_head.weight is in {shard.name}, but it is not there" in message


def test_a_tensor_in_two_shards(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(llama, tmp_path / "model")
    first, second, *_ = sorted(model.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    message = refused(command, model, tmp_path / "out")
    assert f"{name} is stored in both {first.name} and {second.name}: keep one of them" in message


def test_a_tensor_under_another_name(whole: Path, tmp_path: Path, command: RunCommand) -> None:
    model = copy_of(whole, tmp_path / "model")
    tensors = load_file(model / SHARD)
    tensors["model.layers.1.mlp.up_projection.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, model / SHARD)
    message = refused(command, model, tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight is not in the checkpoint though config.json describes it" in message


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinite values")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_values_that_are_not_finite(
    name: str, value: float, word: str, dtype: torch.dtype, whole: Path, tmp_path: Path, command: RunCommand
) -> None:
    model = copy_of(whole, tmp_path / "model")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(model / SHARD).items()}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, model / SHARD)
    assert f"{name} in {SHARD} holds {word}" in refused(command, model, tmp_path / "out")
