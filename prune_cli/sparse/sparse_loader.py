"""Loads the checkpoint that this file lies in, stored sparse: from_pretrained(..., trust_remote_code=True).

prune-cli convert --self-contained has put it there; the format is docs/sparse-safetensors.md of prune-cli. It decodes
into a temporary folder and has transformers load that. Numpy, zlib, transformers and huggingface_hub alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
import zlib
from itertools import combinations
from math import comb, prod
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download

_KEY = "prune_cli_sparse"
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
_FROM_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_NOT_OF_THE_HUB = ("proxies", "code_revision")
_OTHER_FILES = ("model.safetensors.index.json", "generation_config.json")


class SparseLoader:
    """What `auto_map` names for every Auto class: its from_pretrained returns the model of the dense weights."""

    _auto: Any = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any) -> None:
        """transformers tells here, right before it loads, which Auto class was asked."""
        cls._auto = auto_class

    @classmethod
    def from_pretrained(cls, name: str, *arguments: Any, config: Any, **options: Any) -> Any:
        hub = {key: options.pop(key) for key in _FROM_HUB if key in options}
        source = Path(name)
        if not source.is_dir():
            source = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], **hub))
        source = source / (options.pop("subfolder", None) or "")
        for key in _NOT_OF_THE_HUB:
            options.pop(key, None)
        for entry in ("quantization_config", "auto_map"):
            if hasattr(config, entry):
                delattr(config, entry)
        folder = tempfile.TemporaryDirectory(prefix="sparse-safetensors-")
        try:
            for path in sorted(source.glob("*.safetensors")):
                write_dense(path, Path(folder.name) / path.name)
            for other in _OTHER_FILES:
                if (source / other).is_file():
                    shutil.copyfile(source / other, Path(folder.name) / other)
            loaded = cls._auto.from_pretrained(folder.name, *arguments, config=config, **options)
        except BaseException:
            folder.cleanup()
            raise
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(name)
        # Weights that stay on the disk are read from there as long as the model lives.
        weakref.finalize(model, folder.cleanup)
        return loaded


def write_dense(path: Path, target: Path) -> None:
    """The dense file that the sparse one at `path` stands for. Raises ValueError that names a damaged tensor."""
    data = np.memmap(path, np.uint8, mode="r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length].tobytes())
    about = json.loads(header.get("__metadata__", {}).get(_KEY, "{}"))
    if about.get("version") not in (1, 2):
        raise ValueError(f"{path} has version {about.get('version')} of sparse safetensors, this loader reads 1 and 2.")
    dense_header = about["dense_header"].encode()
    places = {name: told["data_offsets"] for name, told in json.loads(dense_header).items() if name != "__metadata__"}

    def stored(name: str) -> np.ndarray:
        begin, end = header[name]["data_offsets"]
        return data[8 + length + begin : 8 + length + end]

    with target.open("wb") as file:
        file.write(len(dense_header).to_bytes(8, "little") + dense_header)
        for name in sorted(places, key=lambda name: tuple(places[name])):
            told = about["tensors"][name]
            values, encoding = stored(name), told["encoding"].removesuffix("+deflate")
            if encoding != told["encoding"]:
                values = _inflated(name, told["dtype"], stored(name + ".sparse_high"), values)
            if encoding != "dense":
                values = _decoded(name, told, encoding, values, stored(name + ".sparse_mask"))
            if len(values) != places[name][1] - places[name][0] or zlib.crc32(values.data) != int(told["crc32"], 16):
                raise ValueError(f"{name} in {path} is damaged: its checksum is wrong.")
            file.write(values.data)


def _inflated(name: str, dtype: str, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The bytes of values whose high bytes are deflated and whose sign is at the other end."""
    size = _BYTES[dtype]
    count, inflate = len(low) // (size - 1), zlib.decompressobj(-15)
    every = np.empty((count, size), np.uint8)
    # One byte more than expected may come out, and no other: what does not fit is not inflated.
    first = inflate.decompress(high.data, count + 1)
    if len(first) != count or not inflate.eof:
        raise ValueError(f"{name} is damaged: its high bytes are not as many as its values.")
    every[:, -1] = np.frombuffer(first, np.uint8)
    every[:, :-1] = low.reshape(count, -1)
    turned = every.reshape(-1).view(f"<u{size}")
    return (turned >> 1 | turned << (8 * size - 1)).view(np.uint8)


def _decoded(name: str, told: Any, encoding: str, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The bytes of a tensor of kept values and a mask."""
    kept = _kept(mask, encoding, prod(told["shape"]))
    values = np.frombuffer(values, f"<u{_BYTES.get(told['dtype'], 1)}")
    if len(values) != np.count_nonzero(kept):
        raise ValueError(f"{name} is damaged: it has {len(values)} values, but its mask keeps another number.")
    elements = np.zeros(len(kept), values.dtype)
    elements[kept] = values
    return elements.view(np.uint8)


def _kept(mask: np.ndarray, encoding: str, count: int) -> np.ndarray:
    """(count,) booleans of a bitmask, or of words that hold ranks of groups."""
    if encoding == "bitmask":
        return np.unpackbits(mask, count=count, bitorder="little").view(bool)
    keep, of = map(int, encoding.split(":"))
    states = comb(of, keep)
    fits = {size: max(k for k in range(8 * size + 1) if states**k <= 256**size) for size in (1, 2, 4)}
    size = min((size for size in fits if fits[size]), key=lambda size: (size / fits[size], size))
    numbers = sorted(sum(1 << place for place in places) for places in combinations(range(of), keep))
    table = np.array([[number >> place & 1 for place in range(of)] for number in numbers], bool)
    words = np.frombuffer(mask, f"<u{size}").astype(np.uint32)
    ranks = np.empty((len(words), fits[size]), np.uint32)
    for place in range(fits[size]):
        words, ranks[:, place] = np.divmod(words, np.uint32(states))
    return table[ranks.reshape(-1)[: count // of]].reshape(-1)
