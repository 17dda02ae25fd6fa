"""`to_semi_structured`: which layers are taken and why others are not, and a clear answer without such a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prune_cli import PruneError, to_semi_structured
from prune_cli.loading.semi_structured import choose_layers, device_problem


def _model(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Layers that are 2:4, but for `dense`; `tied` shares its weight with an embedding, `odd` has an odd shape."""
    model: Any = nn.Module()
    model.embed = nn.Embedding(32, 64)
    sizes = {"good": (64, 32), "dense": (64, 32), "odd": (64, 24), "narrow": (32, 32), "tied": (64, 32)}
    for name, (inputs, outputs) in sizes.items():
        layer = nn.Linear(inputs, outputs, bias=name == "good")
        if name != "dense":
            layer.weight.data.view(-1, 4)[:, 1::2] = 0
        setattr(model, name, layer)
    model.tied.weight = model.embed.weight
    return model.to(dtype)


def test_layers_are_chosen_and_reasons_told() -> None:
    chosen, kept = choose_layers(_model(), lambda device: None)
    assert chosen == ["good"]
    assert kept == {
        "dense": "it is not 2:4: 4 of 4 weights are kept somewhere",
        "odd": "its shape [24, 64] is no multiple of 32 x 64",
        "narrow": "its shape [32, 32] is no multiple of 32 x 64",
        "tied": "its weight is shared with another layer",
    }


def test_one_group_too_full_keeps_a_layer_dense() -> None:
    model = _model()
    model.good.weight.data[3, 4:7] = 1
    assert choose_layers(model, lambda device: None)[1]["good"].startswith("it is not 2:4: 3 of 4")


def test_float32_and_other_devices_are_kept() -> None:
    assert "load the model in bfloat16" in choose_layers(_model(torch.float32), lambda device: None)[1]["good"]
    chosen, kept = choose_layers(_model(), device_problem)
    assert chosen == []
    assert set(kept.values()) == {"cpu is no NVIDIA GPU"}


def test_without_the_gpu_nothing_is_changed_and_the_answer_is_clear() -> None:
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PruneError, match=r"cpu is no NVIDIA GPU.*compute capability 8\.0 or newer: move the model"):
        to_semi_structured(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert device_problem(torch.device("cuda", 0)) == "cuda:0 has compute capability 7.5, below 8.0"


def test_importing_the_name_imports_no_torch() -> None:
    code = "import sys; from prune_cli import to_semi_structured; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.skipif(device_problem(torch.device("cuda")) is not None, reason="needs an NVIDIA GPU with 2:4 kernels")
@pytest.mark.filterwarnings("ignore")
def test_the_outputs_stay_the_same_on_a_gpu() -> None:
    model = _model().to("cuda")
    inputs = torch.randn(3, 5, 64, device="cuda", dtype=torch.bfloat16)
    expected = model.good(inputs)
    assert to_semi_structured(model).converted == ("good",)
    torch.testing.assert_close(model.good(inputs), expected, rtol=2e-2, atol=2e-2)
