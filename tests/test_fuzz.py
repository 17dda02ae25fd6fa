"""Headers and indexes changed at random: a checkpoint is read or refused, and nothing else ever happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.checks.inspection import inspect_model
from prune_cli.errors import RequestError
from tests.broken import INDEX, SHARD, join_shard, split_shard


def _works_or_is_refused(folder: Path) -> None:
    """Any other exception than RequestError fails the test."""
    try:
        Checkpoint.open(folder)
    except RequestError:
        return
    inspect_model(str(folder))


def _small(folder: Path, part: str) -> Path:
    """A checkpoint so small that nearly every change hits something that matters; returns the file to break."""
    tensors = {"a.0.w": torch.ones(4, 4), "a.1.w": torch.ones(4, 2).half(), "norm": torch.ones(3).bfloat16()}
    save_file(tensors, folder / (SHARD if part == "header" else "x.safetensors"), metadata={"format": "pt"})
    if part == "header":
        return folder / SHARD
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "x.safetensors")}))
    return folder / INDEX


_FUZZ = settings(max_examples=500, deadline=None, database=None)
_BYTES = st.binary(min_size=1, max_size=3) | st.text('0123456789-.eE[]{}",:nul\\ /', min_size=1, max_size=3).map(
    str.encode
)
_PATCHES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), _BYTES), min_size=1, max_size=3)


@pytest.mark.parametrize("part", ["header", "index"])
def test_changed_bytes_are_read_or_refused(part: str, tmp_path: Path) -> None:
    path = _small(tmp_path, part)
    sound = path.read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little") if part == "header" else len(sound)
    assert inspect_model(str(tmp_path)).totals

    @_FUZZ
    @given(patches=_PATCHES, cut=st.sampled_from([0, 0, 0, 1, 3]), grow=st.sampled_from([b"", b"", b"\0", b"}"]))
    def change(patches: list[tuple[float, bytes]], cut: int, grow: bytes) -> None:
        content = bytearray(sound)
        for where, data in patches:
            place = int(where * end)
            content[place : place + len(data)] = data
        path.write_bytes(bytes(content[: len(content) - cut]) + grow)
        _works_or_is_refused(tmp_path)

    change()


_LEAVES = st.none() | st.booleans() | st.integers(-4, 70) | st.integers() | st.floats() | st.text(max_size=3)
_NAMES = st.sampled_from(["dtype", "shape", "data_offsets", "a.0.w", "norm", "weight_map"]) | st.text(max_size=3)
_JSON = st.recursive(
    _LEAVES | st.sampled_from(["F32", "F4", "BOOL", "x.safetensors"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("part", ["header", "index"])
def test_other_json_is_read_or_refused(part: str, tmp_path: Path) -> None:
    path = _small(tmp_path, part)
    header, data = split_shard(path) if part == "header" else (json.loads(path.read_text()), b"")

    @_FUZZ
    @given(value=_JSON, where=st.lists(st.integers(0, 3), max_size=3))
    def change(value: object, where: list[int]) -> None:
        document = json.loads(json.dumps({"document": header}))
        key, inside = "document", document
        for step in where:
            if isinstance(inside[key], dict) and inside[key]:
                inside = inside[key]
                key = list(inside)[step % len(inside)]
        inside[key] = value
        text = json.dumps(document["document"])
        join_shard(path, text, data) if part == "header" else path.write_text(text)
        _works_or_is_refused(tmp_path)

    change()
