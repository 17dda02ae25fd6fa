"""`convert --self-contained`: plain transformers loads the checkpoint with trust_remote_code, and only with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_cli.sparse.format import open_shard
from prune_cli.sparse.sparse_loader import write_dense
from tests.broken import change_config
from tests.conftest import RunCommand, folder_bytes
from tests.forked import run_program
from tests.sparse_files import dense_file, sparse_file, zeroed
from tests.tiny import save_tiny

_PROGRAM = """
import sys
sys.modules["prune_cli"] = None  # so that importing it fails
import torch
from transformers import AutoModel, AutoModelForCausalLM

def check(sparse, dense, saved):
    for trust in (None, False):
        try: AutoModelForCausalLM.from_pretrained(sparse, trust_remote_code=trust)
        except Exception as error: print("refused", type(error).__name__)
    for auto, options in ((AutoModel, {}), (AutoModelForCausalLM, {"dtype": torch.float32})):
        model = auto.from_pretrained(sparse, trust_remote_code=True, **options)
        expected = auto.from_pretrained(dense, **options)
        theirs = expected.state_dict()
        assert type(model) is type(expected) and list(model.state_dict()) == list(theirs)
        assert all(torch.equal(t, theirs[n]) and t.dtype == theirs[n].dtype for n, t in model.state_dict().items())
        assert model.name_or_path == sparse
    model.save_pretrained(saved + "/sparse")
    expected.save_pretrained(saved + "/dense")

for folder in sys.argv[1:]:
    check(folder + "/sparse", folder + "/dense", folder + "/saved")
"""


def test_loads_without_the_package_and_only_when_trusted(tmp_path: Path, command: RunCommand) -> None:
    kinds: dict[str, tuple[dict[str, Any], tuple[int, int] | None]] = {
        "llama-tied": ({"hidden_size": 64}, None),
        "mixtral": ({"hidden_size": 64}, (2, 4)),
    }
    for kind, (sizes, pattern) in kinds.items():
        zeroed(save_tiny(tmp_path / kind / "dense", kind, dtype=torch.bfloat16, **sizes), pattern=pattern)
        form = ["--self-contained", *(["--compress"] if pattern else [])]
        done = command("convert", tmp_path / kind / "dense", tmp_path / kind / "sparse", *form, "-q")
        assert done.code == 0
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "TMPDIR": str(tmp_path)}
    ran = run_program(_PROGRAM, *(tmp_path / kind for kind in kinds), env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("refused") == 2 * len(kinds)
    for kind in kinds:
        saved = tmp_path / kind / "saved"
        assert folder_bytes(saved / "sparse") == folder_bytes(saved / "dense")
    assert not list(tmp_path.glob("sparse-safetensors-*"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    return zeroed(save_tiny(folder, "llama-tied", dtype=torch.bfloat16, hidden_size=64))


def test_it_is_a_sparse_checkpoint_like_any_other(dense: Path, tmp_path: Path, command: RunCommand) -> None:
    sparse = tmp_path / "sparse"
    assert command("convert", dense, sparse, "--self-contained", "-q").code == 0
    assert command("verify", sparse, "--against", dense, "-q").code == 0
    assert command("convert", sparse, tmp_path / "back", "--format", "dense", "-q").code == 0
    assert folder_bytes(tmp_path / "back") == folder_bytes(dense)
    # With this package nothing of it is run, and nothing of it is saved.
    loaded: Any = AutoModelForCausalLM.from_pretrained(sparse)
    loaded.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_what_has_code_of_its_own_is_refused(dense: Path, tmp_path: Path, command: RunCommand) -> None:
    own = change_config(shutil.copytree(dense, tmp_path / "own"), auto_map={"AutoModel": "mine.Mine"})
    refused = command("convert", own, tmp_path / "out", "--self-contained")
    assert refused.code == 2
    assert "has an auto_map for code of its own already: leave out --self-contained" in refused.stderr
    refused = command("convert", dense, tmp_path / "out", "--self-contained", "--format", "dense")
    assert refused.code == 2
    assert "dense files need no loader" in refused.stderr


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize("pattern", [None, (1, 3), (2, 4), (4, 8), (3, 16)], ids=str)
def test_the_loader_decodes_every_encoding_and_names_damage(
    pattern: tuple[int, int] | None, compress: bool, tmp_path: Path
) -> None:
    weight = torch.randn(48, 48).to(torch.bfloat16)
    keep, of = pattern or (2, 4)
    places = torch.rand(48, 48) if pattern is None else torch.rand(weight.numel() // of, of).argsort(1).argsort(1) / of
    weight[(places >= (0.4 if pattern is None else keep / of)).reshape(48, 48)] = 0
    dense = dense_file(tmp_path / "dense.safetensors", {"a": weight.contiguous(), "b": torch.ones(3)})
    sparse = sparse_file(dense, tmp_path / "sparse.safetensors", compress=compress)
    tensor = open_shard(sparse).tensors["a"]
    assert tensor.encoding == ("bitmask" if pattern is None else f"{keep}:{of}")
    write_dense(sparse, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == dense.read_bytes()
    content = bytearray(sparse.read_bytes())
    content[tensor.values.begin] ^= 1
    sparse.write_bytes(content)
    with pytest.raises(ValueError, match=r"a in .* is damaged: its checksum is wrong"):
        write_dense(sparse, tmp_path / "again.safetensors")
