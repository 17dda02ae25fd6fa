"""No output holds a weight that is not finite, and `verify` finds one that does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prune_cli.checkpoint.stored_values import to_stored
from prune_cli.errors import PruneError
from prune_cli.soup.average import average
from tests.conftest import RunCommand
from tests.tiny import save_tiny

FILE = "model.safetensors"
_MLP = "model.layers.0.mlp.down_proj.weight"


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=6),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_what_is_stored_is_finite_or_refused_by_name(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values)
    cast = [torch.tensor(value).to(dtype) for value in values]
    if all(bool(value.isfinite()) for value in cast):
        assert torch.equal(to_stored("a.weight", tensor, dtype), torch.stack(cast))
        return
    with pytest.raises(PruneError, match=r"^The new weights of a\.weight are (not finite|as large as)") as caught:
        to_stored("a.weight", tensor, dtype)
    if bool(tensor.isfinite().all()):
        largest = max(map(abs, tensor.tolist()))
        assert f"as large as {largest:.4g}, beyond the {torch.finfo(dtype).max:.4g} of " in str(caught.value)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in float16, with weights near its end, and a text of one token: what is pruned goes to few weights."""
    folder = tmp_path_factory.mktemp("large")
    save_tiny(folder / "model", "llama-untied", dtype=torch.float16, shards=False)
    tensors = load_file(folder / "model" / FILE)
    for name in (_MLP, "model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        tensors[name] = torch.full_like(tensors[name], 6e4)
    save_file(tensors, folder / "model" / FILE, metadata={"format": "pt"})
    save_file({"input_ids": torch.full((4, 16), 7)}, folder / "text.safetensors")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("-m", "sparsegpt"),
        ("-m", "wanda", "--reconstruct"),
        ("-m", "width", "-s", "0.5", "-o", "parts=mlp"),
    ],
    ids=lambda options: options[1],
)
def test_solved_weights_beyond_float16_end_the_run(
    options: tuple[str, ...], large: Path, tmp_path: Path, command: RunCommand
) -> None:
    run = command("prune", large / "model", tmp_path / "out", *options, "--calibration", large / "text.safetensors")
    assert run.code == 1, run
    assert " are as large as " in run.stderr
    assert "beyond the 6.55e+04 of float16, in which it is stored: use more calibration text" in run.stderr.replace(
        "\n", " "
    )
    assert not (tmp_path / "out").exists()


def test_an_average_beyond_float16_is_refused() -> None:
    tensor = torch.full((2, 2), 6e4, dtype=torch.float16)
    with pytest.raises(PruneError, match=r"new weights of w are as large as 1\.2e\+05"):
        average("w", [lambda: tensor, lambda: tensor], [1.0, 1.0], "same", sparse=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_verify_calls_a_weight_that_is_not_finite_unsound(
    value: float, dtype: torch.dtype, tmp_path: Path, command: RunCommand
) -> None:
    model = save_tiny(tmp_path / "model", "llama-untied", dtype=dtype, shards=False, tokenizer=False)
    assert command("verify", model, "-q").code == 0
    tensors = load_file(model / FILE)
    tensors[_MLP][1, 2] = value
    save_file(tensors, model / FILE, metadata={"format": "pt"})
    found = command("verify", model, "--json", "-q")
    assert found.code == 1
    assert found.json["problems"] == [{"name": _MLP, "problem": f"{_MLP} holds 1 weights that are not finite."}]
