"""Sparse shards changed at random: decoded to just what was stored, or refused in one sentence; nothing else."""

from __future__ import annotations

import json
import random
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prune_cli.errors import PruneError
from prune_cli.sparse.coding import decode, encode, mask_bytes
from prune_cli.sparse.decode_shard import decoded
from prune_cli.sparse.deflate import Inflating
from prune_cli.sparse.format import METADATA_KEY, open_shard
from prune_cli.sparse.groups import CodingError, GroupCode
from tests.broken import join_shard, split_shard
from tests.sparse_files import dense_file, sparse_file

_Everything = tuple[bytes, dict[str, tuple[str, tuple[int, ...], bytes]]]


@pytest.fixture(params=[False, True], ids=["plain", "deflated"])
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small file with every way of storing: dense, bitmask, 2:4, 4:8 (words of four bytes), all zeros."""
    generator = torch.Generator().manual_seed(1)
    half = torch.where(torch.rand(20, 32, generator=generator) < 0.5, torch.randn(20, 32, generator=generator), 0)
    groups = torch.rand(320, 4, generator=generator).argsort(1).argsort(1).reshape(40, 32) < 2
    eights = torch.rand(80, 8, generator=generator).argsort(1).argsort(1).reshape(20, 32) < 4
    tensors = {"half": half.bfloat16(), "two.four": torch.where(groups, 1.5, 0).half(), "norm": torch.ones(5)}
    tensors |= {"four.eight": torch.where(eights, -2.0, 0), "zeros": torch.zeros(20, 30)}
    tensors |= {"head": torch.randn(30, 20, generator=generator).half()}
    dense = dense_file(tmp_path / "dense.safetensors", tensors)
    return sparse_file(dense, tmp_path / "sparse.safetensors", compress=request.param)


def _everything(path: Path) -> _Everything:
    opened = open_shard(path)
    tensors = {
        name: (tensor.dtype, tensor.shape, b"".join(piece.tobytes() for piece in decoded(opened, tensor)))
        for name, tensor in opened.tensors.items()
    }
    return opened.dense_header, tensors


def _outcome(path: Path, expected: _Everything) -> bool:
    """True if the file still decodes, to `expected`; False if it is refused. Any other exception fails the test."""
    try:
        found = _everything(path)
    except PruneError as error:
        told = str(error)
    else:
        assert found == expected
        return True
    assert "\n" not in told
    return False


def _any_bytes(chance: random.Random, content: bytearray) -> None:
    for _ in range(chance.randint(1, 3)):
        place, size = chance.randrange(len(content)), chance.choice([1, 1, 1, 2, 8])
        match chance.randrange(4):
            case 0:
                content[place] ^= 1 << chance.randrange(8)
            case 1:
                content[place : place + size] = chance.randbytes(size)
            case 2:
                del content[place : place + size]
            case _:
                content[place:place] = chance.randbytes(size)


def _header_text(chance: random.Random, content: bytearray) -> None:
    end = 8 + int.from_bytes(content[:8], "little")
    place = chance.randrange(8, end)
    text = chance.choice([b"0", b"9", b'"', b"-", b"e", b"}", b"[", b",", b"\\", b"null", b"BF16", b"2:4", b" "])
    content[place : place + len(text)] = text


def _cut(chance: random.Random, content: bytearray) -> None:
    del content[chance.randrange(len(content)) :]


@pytest.mark.parametrize(("change", "times"), [(_any_bytes, 600), (_header_text, 400), (_cut, 100)])
def test_changed_bytes(change: Callable[[random.Random, bytearray], None], times: int, shard: Path) -> None:
    sound, expected, chance = shard.read_bytes(), _everything(shard), random.Random(0)
    kept = 0
    for _ in range(times):
        content = bytearray(sound)
        change(chance, content)
        shard.write_bytes(content)
        kept += _outcome(shard, expected)
    # Spaces that become spaces, entries of the metadata that are not ours: little else may pass.
    assert kept < times / 20


_VALUES: list[Any] = [None, True, -1, 0, 1, 2, 4, 2**31, 2**63, 2**70, 0.5, "", "2:4", "4:2", "bitmask", "dense", "F32"]
_VALUES += ["dense+deflate", "bitmask+deflate", "2:4+deflate", "U8", "F16"]
_VALUES += [[], [0], [20, 32], [32, 20], [2**40, 2**40], [-1], {}, "00000000", "../../x", "two.four", "\ud800"]


def test_changed_descriptions(shard: Path) -> None:
    """Any value anywhere in what a shard says of itself: counts that disagree, huge shapes, names missing."""
    header, data = split_shard(shard)
    about, expected, chance = header["__metadata__"][METADATA_KEY], _everything(shard), random.Random(0)
    for _ in range(600):
        document = {"header": json.loads(json.dumps(header)), "about": json.loads(about)}
        inside, key = document, chance.choice(["header", "about"])
        while isinstance(inside[key], dict) and inside[key] and chance.random() < 0.8:
            inside = inside[key]
            key = chance.choice(list(inside))
        old = inside[key]
        if chance.random() < 0.2:
            del inside[key]
        else:
            inside[key] = chance.choice(_VALUES)
            if chance.random() < 0.2:
                inside[str(chance.choice(_VALUES))] = old
        if isinstance(document.get("header"), dict) and isinstance(document["header"].get("__metadata__"), dict):
            document["header"]["__metadata__"][METADATA_KEY] = json.dumps(document.get("about"))
        text = json.dumps(document.get("header"), ensure_ascii=True)
        join_shard(shard, text, data)
        _outcome(shard, expected)


def test_any_mask_and_values() -> None:
    """The decoder alone, without checksums: what it does not refuse is what the encoder writes."""
    chance, numbers = random.Random(0), np.random.default_rng(0)
    decodable = 0
    for _ in range(3000):
        encoding, count = chance.choice(["bitmask", "2:4", "1:2", "4:8", "3:5", "8:16"]), chance.randrange(1, 200)
        if encoding != "bitmask" and chance.random() < 0.9:
            count -= count % GroupCode.named(encoding).of
        try:
            size = mask_bytes(encoding, count) + chance.choice([0, 0, 0, 0, 1])
        except CodingError:
            size = chance.randrange(30)
        mask = numbers.integers(0, chance.choice([2, 70, 256]), size, np.uint8)
        kept = int(np.unpackbits(mask).sum()) if encoding == "bitmask" else count * int(encoding[0]) // 4
        values = numbers.integers(1, 9, kept + chance.choice([-1, 0, 0, 0, 1]) if kept else 0, np.uint16)
        try:
            bits = np.concatenate([np.zeros(0, np.uint16), *decode(values, mask, encoding, count)])
        except CodingError:
            continue
        decodable += count > 0
        if not count:
            continue
        again = [np.concatenate(parts) for parts in zip(*encode(bits, encoding), strict=True)]
        assert np.array_equal(again[0], values)
        assert np.array_equal(again[1], mask)
    assert decodable > 100


@pytest.mark.parametrize(("count", "told"), [(1 << 26, "more than its values"), (999, "fewer than its values")])
def test_what_does_not_fit_is_not_inflated(count: int, told: str) -> None:
    """A stream of many zeros in few bytes: refused when one byte too many comes out, not after all of them."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = coder.compress(bytes(count)) + coder.flush()
    values = Inflating(np.frombuffer(stream, np.uint8), np.zeros(1000, np.uint8), np.dtype("<u2"))

    def read() -> None:
        _ = values[0:500], values[500:1000]
        values.check_end()

    tracemalloc.start()
    with pytest.raises(CodingError, match=told):
        read()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 500_000


def test_every_refusal_names_the_tensor(shard: Path) -> None:
    header, data = split_shard(shard)
    for name, fields in header.items():
        begin, end = fields.get("data_offsets", (0, 0))
        if begin == end:
            continue
        broken = bytearray(data)
        broken[(begin + end) // 2] ^= 4
        join_shard(shard, header, bytes(broken))
        tensor = name.removesuffix(".sparse_mask").removesuffix(".sparse_high")
        with pytest.raises(PruneError, match=rf"^{tensor} in .* is damaged: "):
            _everything(shard)
