"""The coding of sparse safetensors: exact for every bit pattern, as small as promised, strict in what it reads."""

from __future__ import annotations

from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from examples.read_sparse import kept_elements, read_file
from prune_cli.sparse import coding
from prune_cli.sparse.coding import BITMASK, DENSE, decode, encode, mask_bytes, plan
from prune_cli.sparse.decode_shard import decoded
from prune_cli.sparse.format import open_shard
from prune_cli.sparse.groups import CodingError, GroupCode, fullest, group_numbers
from tests.sparse_files import dense_file, sparse_file

_KINDS = [np.dtype("<u1"), np.dtype("<u2"), np.dtype("<u4"), np.dtype("<u8")]
_PATTERNS = [(keep, of) for of in range(2, 17) for keep in range(1, of)]


def _whole(bits: np.ndarray, encoding: str) -> tuple[np.ndarray, np.ndarray]:
    values, masks = zip(*encode(bits, encoding), strict=True)
    return np.concatenate(values), np.concatenate(masks)


def _restored(values: np.ndarray, mask: np.ndarray, encoding: str, count: int) -> np.ndarray:
    return np.concatenate([np.zeros(0, values.dtype), *decode(values, mask, encoding, count)])


@st.composite
def _sparse_bits(draw: st.DrawFn) -> np.ndarray:
    seed, kind = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(_KINDS))
    count, share = draw(st.integers(1, 700)), draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    numbers = np.random.default_rng(seed)
    bits = numbers.integers(0, 2 ** (8 * kind.itemsize), count, kind, endpoint=False)
    bits[numbers.random(count) < share] = 0
    return bits


@settings(max_examples=200, deadline=None, database=None)
@given(bits=_sparse_bits(), chunk=st.sampled_from([48, 1 << 17]))
def test_bitmask_gives_every_bit_pattern_back(bits: np.ndarray, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "_CHUNK", chunk)
        values, mask = _whole(bits, BITMASK)
        assert np.array_equal(_restored(values, mask, BITMASK, len(bits)), bits)
    assert np.array_equal(values, bits[bits != 0])
    assert np.array_equal(kept_elements(mask.tobytes(), BITMASK, len(bits)), bits != 0)


@pytest.mark.parametrize(("keep", "of"), _PATTERNS)
def test_every_pattern_gives_every_bit_pattern_back(keep: int, of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several chunks, with groups that are full, that are not, and that are empty."""
    monkeypatch.setattr(coding, "_CHUNK", 4096)
    numbers = np.random.default_rng(of * 100 + keep)
    groups = 1000
    bits = numbers.integers(1, 2**16, (groups, of), np.uint16)
    bits[numbers.random((groups, of)).argsort(1) >= keep] = 0
    bits[: groups // 2][numbers.random((groups // 2, of)) < 0.3] = 0
    bits = bits.reshape(-1)
    values, mask = _whole(bits, f"{keep}:{of}")
    assert len(values) == groups * keep
    assert len(mask) == mask_bytes(f"{keep}:{of}", len(bits))
    assert np.array_equal(_restored(values, mask, f"{keep}:{of}", len(bits)), bits)
    assert kept_elements(mask.tobytes(), f"{keep}:{of}", len(bits)).sum() == groups * keep


@pytest.mark.parametrize(("keep", "of"), _PATTERNS)
def test_words_are_those_with_the_fewest_bits(keep: int, of: int) -> None:
    code = GroupCode.named(f"{keep}:{of}")
    states, groups, size = comb(of, keep), code.groups_per_word, code.word_bytes
    assert states**groups <= 256**size < states ** (groups + 1)
    others = [(k, w) for w in (1, 2, 4) for k in range(1, 33) if states**k <= 256**w]
    assert size / groups == min(w / k for k, w in others)


@pytest.mark.parametrize("of", range(2, 17))
def test_group_numbers_and_the_fullest_group(of: int) -> None:
    numbers = np.random.default_rng(of)
    for groups in (0, 1, 3, 200):
        for share in (0.0, 0.1, 0.7, 1.0):
            kept = numbers.random(groups * of) < share
            rows = kept.reshape(-1, of).tolist()
            assert group_numbers(kept, of).tolist() == [
                sum(1 << place for place in range(of) if row[place]) for row in rows
            ]
            assert fullest(kept, of) == max((sum(row) for row in rows), default=0)


def test_the_smallest_encoding_is_chosen() -> None:
    numbers = np.random.default_rng(0)
    bits = numbers.integers(1, 2**16, 48_000, np.uint16)
    assert plan(bits, 48).encoding == DENSE
    half = np.where(numbers.random(48_000) < 0.5, 0, bits).astype(np.uint16)
    assert plan(half, 48).encoding == BITMASK
    for keep, of in ((2, 4), (1, 4), (4, 8), (2, 8), (1, 2)):
        groups = bits.copy().reshape(-1, of)
        groups[numbers.random(groups.shape).argsort(1) >= keep] = 0
        assert plan(groups.reshape(-1), 48).encoding == f"{keep}:{of}"
        # Only whole rows have groups, and one group too full makes the pattern another.
        assert plan(groups.reshape(-1), 47).encoding == BITMASK
        groups[-1] = 1
        assert plan(groups.reshape(-1), 48).encoding == BITMASK
    assert plan(np.zeros(48_000, np.uint16), 48).encoding in {BITMASK, "1:16"}
    assert plan(np.zeros(0, np.uint16), 1).encoding == DENSE


@pytest.mark.parametrize("encoding", ["0:4", "4:4", "5:4", "2:32", "02:4", "2:4 ", "", "rle", "-1:4", "2:4:8", "²:4"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(CodingError, match="is not known"):
        mask_bytes(encoding, 16)


def test_masks_and_values_that_disagree_are_refused() -> None:
    bits = np.array([1, 0, 2, 0, 0, 3, 4, 0, 5, 0, 0, 6, 7, 0], np.uint16)
    values, mask = _whole(bits, BITMASK)
    with pytest.raises(CodingError, match="more than its 6 values"):
        _restored(values[:-1], mask, BITMASK, 14)
    with pytest.raises(CodingError, match="keeps 7 values, but 8 are stored"):
        _restored(np.append(values, values[:1]), mask, BITMASK, 14)
    with pytest.raises(CodingError, match="mask has 2 bytes, expected 3"):
        _restored(values, mask, BITMASK, 17)
    with pytest.raises(CodingError, match="not filled up"):
        _restored(values, mask | np.array([0, 64], np.uint8), BITMASK, 14)
    with pytest.raises(CodingError, match="no whole groups of 4"):
        _restored(values, mask, "2:4", 14)
    four = np.array([1, 2, 0, 0] * 5, np.uint16)
    values, mask = _whole(four, "2:4")
    assert len(mask) == 2
    with pytest.raises(CodingError, match="stands for no group"):
        _restored(values, np.array([216, 0], np.uint8), "2:4", 20)
    with pytest.raises(CodingError, match="not filled up"):
        _restored(values, mask + np.array([0, 36], np.uint8), "2:4", 20)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "deflated"])
def test_every_dtype_comes_back_with_its_bits_and_numpy_alone_reads_it(compress: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64):
        count = 64 * 48 * dtype.itemsize
        data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(64, 48)
        tensors[str(dtype)] = torch.where(torch.rand(64, 48, generator=generator) < 0.6, 0, data.view(_integer(dtype)))
        tensors[str(dtype)] = tensors[str(dtype)].view(dtype)
    negative = torch.zeros(64, 64)
    negative[::3] = -0.0
    negative[1] = torch.nan
    tensors |= {"negative zeros": negative, "int64": torch.randint(0, 2, (64, 64), generator=generator)}
    tensors |= {"bool": torch.rand(99, 64, generator=generator) < 0.2, "norm": torch.zeros(2000), "one": torch.ones(())}
    weights = torch.randn(64, 48, generator=generator)
    weights[::2, ::2] = torch.tensor([-0.0, torch.inf, torch.nan, 0.0]).repeat(6)
    tensors |= {f"weights {dtype}": weights.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    tensors |= {
        "experts": torch.ones(4, 30, 20).tril(),
        "empty": torch.zeros(0, 7),
        "zeros": torch.zeros(70, 70).half(),
    }
    dense = dense_file(tmp_path / "dense.safetensors", tensors)
    sparse = sparse_file(dense, tmp_path / "sparse.safetensors", compress=compress)
    shard = open_shard(sparse)
    read = read_file(sparse)
    assert list(read) == list(shard.tensors)
    with safe_open(dense, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            expected = (
                opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes() if name != "empty" else b""
            )
            assert b"".join(piece.tobytes() for piece in decoded(shard, shard.tensors[name])) == expected
            assert read[name] == (shard.tensors[name].dtype, list(shard.tensors[name].shape), expected)
    assert {name for name, tensor in shard.tensors.items() if tensor.high} == (
        {"experts", "negative zeros", *(name for name in tensors if name.startswith("weights "))} if compress else set()
    )
    encodings = {name: tensor.encoding for name, tensor in shard.tensors.items() if not name.startswith("weights ")}
    assert {name for name, encoding in encodings.items() if encoding == DENSE} == {"norm", "one", "empty"}
    assert sparse.stat().st_size < 0.65 * dense.stat().st_size


def _integer(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def test_a_reader_that_does_not_know_the_format_meets_another_shape(tmp_path: Path) -> None:
    weight = torch.where(torch.rand(64, 64) < 0.5, torch.randn(64, 64), 0)
    save_file({"w": weight}, tmp_path / "dense.safetensors")
    with safe_open(sparse_file(tmp_path / "dense.safetensors", tmp_path / "sparse.safetensors"), "pt") as opened:
        assert sorted(opened.keys()) == ["w", "w.sparse_mask"]
        assert opened.get_tensor("w").shape == (int(weight.count_nonzero()),)
