"""from_pretrained of a sparse checkpoint gives what it gives of the dense one, and saves what that saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from prune_cli.errors import PruneError, RequestError
from tests.broken import change_config
from tests.conftest import folder_bytes, token_ids
from tests.forked import run_program
from tests.sparse_files import sparse_copy, zeroed
from tests.tiny import save_gpt2_without_prefix, save_tiny

_WIDE: dict[str, dict[str, Any]] = {
    "llama-tied": {"hidden_size": 64},
    "mixtral": {"hidden_size": 64},
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 48},
    "gpt2": {"n_embd": 64},
    "phi3": {"hidden_size": 64},
    "bloom": {"hidden_size": 64},
    "mamba": {"hidden_size": 64},
    "gemma3_text": {"hidden_size": 64},
}
_DEFLATED = {"mixtral", "gpt2", "phi3", "gemma3_text"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """kind -> (dense, sparse) folders in bfloat16; made when asked for."""
    made: dict[str, tuple[Path, Path]] = {}

    def pair(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "gpt2-without-prefix":
                dense = save_gpt2_without_prefix(folder / "dense")
            else:
                dense = save_tiny(folder / "dense", kind, dtype=torch.bfloat16, **_WIDE[kind])
            made[kind] = dense, sparse_copy(zeroed(dense), folder / "sparse", compress=kind in _DEFLATED)
        return made[kind]

    return pair


def _same(loaded: torch.nn.Module, expected: torch.nn.Module) -> None:
    theirs = expected.state_dict()
    assert list(loaded.state_dict()) == list(theirs)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.device == theirs[name].device, name
        assert torch.equal(tensor, theirs[name]), name


def _load(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    return cast("PreTrainedModel", auto.from_pretrained(folder, **options))


@pytest.mark.parametrize("kind", [*_WIDE, "gpt2-without-prefix"])
def test_the_dense_model_exactly_and_the_same_files_when_saved(kind: str, pairs: Any, tmp_path: Path) -> None:
    dense, sparse = pairs(kind)
    expected, loaded = _load(dense), _load(sparse)
    _same(loaded, expected)
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.all_tied_weights_keys == expected.all_tied_weights_keys
    ids = token_ids(samples=1, length=8)
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    expected.save_pretrained(tmp_path / "expected")
    loaded.save_pretrained(tmp_path / "saved")
    assert folder_bytes(tmp_path / "saved") == folder_bytes(tmp_path / "expected")


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"device_map": "cpu"},
        {"device_map": "auto", "max_memory": {"cpu": 10**9}},
        {"key_mapping": {"^nothing": "nothing"}},
    ],
    ids=["float32", "float16", "cpu", "auto", "key_mapping"],
)
@pytest.mark.parametrize("kind", ["llama-tied", "qwen3_moe"])
def test_options_of_from_pretrained_do_what_they_do(kind: str, options: dict[str, Any], pairs: Any) -> None:
    dense, sparse = pairs(kind)
    _same(_load(sparse, **options), _load(dense, **options))


@pytest.mark.parametrize("kind", ["llama-tied", "mixtral"])
def test_weights_may_stay_on_the_disk(kind: str, pairs: Any, tmp_path: Path) -> None:
    ids, outputs = token_ids(samples=1, length=8), []
    for folder in pairs(kind):
        where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        where |= {f"model.layers.{block}": "disk" if block else "cpu" for block in range(3)}
        outputs.append(_load(folder, device_map=where, offload_folder=tmp_path / folder.name)(ids).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "mixtral"])
def test_other_auto_classes(kind: str, pairs: Any) -> None:
    dense, sparse = pairs(kind)
    _same(_load(sparse, AutoModel), _load(dense, AutoModel))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = _load(dense, AutoModelForSequenceClassification)
        torch.manual_seed(0)
        _same(_load(sparse, AutoModelForSequenceClassification), expected)


def test_nothing_is_reported_missing_or_unexpected(pairs: Any) -> None:
    _, information = cast("Any", AutoModelForCausalLM).from_pretrained(pairs("mixtral")[1], output_loading_info=True)
    assert not any(information[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_damage_is_told_by_name(pairs: Any, tmp_path: Path) -> None:
    sparse = sparse_copy(pairs("llama-tied")[0], tmp_path / "sparse")
    path = sorted(sparse.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    name, fields = next((n, f) for n, f in header.items() if n.endswith("proj.weight"))
    content[8 + int.from_bytes(content[:8], "little") + fields["data_offsets"][0] + 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(PruneError, match=f"{name} in .* is damaged: its checksum is"):
        _load(sparse)


def test_a_config_that_does_not_fit_and_other_versions_are_refused(pairs: Any, tmp_path: Path) -> None:
    sparse = sparse_copy(pairs("llama-tied")[0], tmp_path / "sparse")
    change_config(sparse, intermediate_size=48)
    # transformers 5.23 tells it itself, 5.17 does not.
    with pytest.raises((RequestError, RuntimeError), match=r"ignore_mismatched_sizes|\[64, 64\] in the checkpoint"):
        _load(sparse)
    change_config(sparse, quantization_config={"quant_method": "prune-cli-sparse", "version": 3})
    with pytest.raises(RequestError, match="version 3 of sparse safetensors"):
        _load(sparse)


def test_without_the_package_loading_fails_and_importing_it_suffices(pairs: Any) -> None:
    """Never random weights. In the other tests the package is imported before transformers, here after it."""
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    try: AutoModelForCausalLM.from_pretrained(folder)\n"
        "    except Exception as error: print('refused', type(error).__name__)\n"
        "assert not any(name.startswith('prune_cli') for name in sys.modules)\n"
        "import prune_cli\n"
        "print('loaded', AutoModelForCausalLM.from_pretrained(sys.argv[1]).lm_head.weight.shape[0])"
    )
    folders = [pairs(kind)[1] for kind in ("llama-tied", "mixtral", "gpt2")]
    done = run_program(code, *folders)
    assert done.stdout.count("refused") == len(folders), done.stdout + done.stderr
    assert done.stdout.endswith("loaded 128\n")
