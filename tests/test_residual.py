"""Which layers add to the residual stream, and what --target dense makes of what the stream has lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration.batch import Batch
from methods import load_method
from methods._pattern import Unstructured
from methods.steps import load_step
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.residual_drift import residual_drift, residual_factors
from prune_cli.engine.stream import Stream
from prune_cli.model.streamed_model import StreamedModel
from tests.conftest import token_ids
from tests.tiny import save_tiny

# What a block adds to its input, as the architecture's own code has it: layer -> factor.
ADDS: dict[str, dict[str, float]] = {
    "llama-untied": {"self_attn.o_proj": 1, "mlp.down_proj": 1},
    "phi3": {"self_attn.o_proj": 1, "mlp.down_proj": 1},
    "granite": {"self_attn.o_proj": 0.5, "mlp.down_proj": 0.5},
    "gpt2": {"attn.c_proj": 1, "mlp.c_proj": 1},
    "gpt_neox": {"attention.dense": 1, "mlp.dense_4h_to_h": 1},
    "cohere": {"self_attn.o_proj": 1, "mlp.down_proj": 1},
    "mamba": {"mixer.out_proj": 1},
    # Norms on the outputs of attention and MLP.
    "gemma2": {},
    "olmo2": {},
    # The experts' output is no layer's.
    "mixtral": {},
}


def open_model(folder: Path, dtype: torch.dtype) -> StreamedModel:
    return StreamedModel(
        folder, Checkpoint.open(folder), dtype=dtype, device=torch.device("cpu"), trust_remote_code=False
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in ADDS), *((kind, torch.bfloat16) for kind in ("granite", "gpt_neox"))],
    ids=str,
)
@torch.no_grad()
def test_the_maps_that_add_are_found_and_the_drift_is_followed(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A second model, another seed's weights, plays the pruned one: the drift equals the difference of the streams."""
    dense = open_model(save_tiny(tmp_path / "dense", kind), dtype)
    other = open_model(save_tiny(tmp_path / "other", kind, seed=1), dtype)
    batches = Batch(token_ids(samples=4)).split(2)
    wanted = {f"{name}.weight": factor for name, factor in ADDS[kind].items()}
    with Stream(other, batches) as stream, Stream(dense, batches) as beside:
        for block in range(len(dense.blocks)):
            stream.load(block)
            beside.load(block)
            names = dense.linear_layers(block)
            with residual_drift(stream, beside, residual_factors(beside, block, names)) as drift:
                found = {name for name in names if drift.at(name, 2) is not None}
                assert {name.partition(f".{block}.")[2] for name in found} == wanted.keys()
                assert drift.at(names[0], 1) is None, "a layer that some batches do not reach has none"
                last = None
                for (name, _), (same, _) in zip(
                    stream.pause_at(block, names), beside.pause_at(block, names), strict=True
                ):
                    assert name == same
                    last = name
            if wanted and block + 1 < len(dense.blocks):
                assert last is not None
                factor = wanted[last.partition(f".{block}.")[2]]
                lost = drift.at(last, 2)
                assert lost is not None
                for r, a, b in zip(lost, beside.waiting(), stream.waiting(), strict=True):
                    assert a is not None
                    assert b is not None
                    allowed = 8 * torch.finfo(dtype).eps * float(a.abs().max() + b.abs().max())
                    assert float((factor * r - (a - b)).abs().max()) <= allowed
            stream.unload(block)
            beside.unload(block)


@pytest.mark.parametrize("name", ["admm", "sparsegpt", "+reconstruct"])
def test_a_drift_is_made_up_for(name: str) -> None:
    """With everything kept, the solution reproduces the dense outputs plus what the stream has lost."""
    generator = torch.Generator().manual_seed(0)
    x, dense, lost = (torch.randn(200, width, generator=generator) for width in (12, 12, 5))
    weight = torch.randn(5, 12, generator=generator)
    known = {"gram": x.T @ x, "output_cross": (dense @ weight.T + lost).T @ x, "sq_norm": x.square().sum(0)}
    method = load_method("wanda" if name.startswith("+") else name)
    kwargs = {"alpha": 1.0, "damping": 1e-6}
    options = method.options() if name.startswith("+") else method.options(**kwargs)
    result = method.prune(weight, known, Unstructured(0.0), options, generator)
    if name.startswith("+"):
        step = load_step(name[1:])
        result = step.improve(weight, result, known, Unstructured(0.0), step.options(steps=60, **kwargs))
    expected = torch.linalg.lstsq(x.double(), (dense @ weight.T + lost).double()).solution.T
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-2, atol=1e-2)
