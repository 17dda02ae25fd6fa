"""The streamed run against whole models in memory, for every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calibration.batch import Batch
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.engine.lockstep import Lockstep
from prune_cli.engine.stream import Stream
from prune_cli.model.streamed_model import StreamedModel
from tests import reference
from tests.conftest import RunCommand, token_ids
from tests.tiny import ARCHITECTURES, load_plain, save_gpt2_without_prefix, save_tiny

KINDS = (*ARCHITECTURES, "gpt2-without-prefix")


def save_kind(folder: Path, kind: str) -> Path:
    return save_gpt2_without_prefix(folder) if kind == "gpt2-without-prefix" else save_tiny(folder, kind)


def open_skeleton(folder: Path) -> StreamedModel:
    return StreamedModel(
        folder, Checkpoint.open(folder), dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False
    )


def written_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_block_by_block_equals_the_whole_forward_exactly(kind: str, tmp_path: Path) -> None:
    folder = save_kind(tmp_path / "model", kind)
    batches = token_ids().split(2)
    plain = load_plain(folder)
    expected = [plain(input_ids=batch, use_cache=False).logits for batch in batches]
    model = open_skeleton(folder)
    model.load_outside()
    with Lockstep(model.forward, model.blocks, [Batch(batch) for batch in batches]) as stream:
        stream.start()
        model.unload_embeddings()
        for index in range(len(model.blocks)):
            model.load_block(index, model.checkpoint)
            stream.run_block(index)
            model.unload_block(index)
            assert all(parameter.is_meta for parameter in model.blocks[index].parameters())
        outputs = [output.logits for output in stream.finish()]
    assert len(model.blocks) == 3
    for output, logits in zip(outputs, expected, strict=True):
        assert torch.equal(output, logits)


@pytest.mark.parametrize(
    ("kind", "by"),
    [*((kind, "sublayer") for kind in KINDS), *((kind, "block") for kind in ("falcon-new", "deepseek_v3", "gpt_oss"))],
)
def test_output_equals_pruning_the_whole_model_in_memory(
    kind: str, by: str, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    folder = save_kind(tmp_path / "model", kind)
    out = tmp_path / "out"
    outcome = command(
        "prune", folder, out, "--calibration", tokens_file, "--calibrate-by", by, "--batch-size", 4, "-q"
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr

    whole = load_plain(folder)
    _, blocks_of_whole = _blocks(whole)
    reference.prune_whole_model(
        whole, blocks_of_whole, token_ids().split(4), reference.wanda_score, _half_of_each_row, by=by
    )
    pruned = load_plain(out)
    expected = whole.state_dict()
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    zeros = sum(int((tensor == 0).sum()) for name, tensor in pruned.state_dict().items() if tensor.ndim == 2)
    assert zeros > 0


def _blocks(model: Any) -> tuple[str, Any]:
    from prune_cli.model.architecture import find_blocks

    return find_blocks(model)


def _half_of_each_row(score: torch.Tensor) -> torch.Tensor:
    return reference.keep_per_row(score, 0.5)


CHOICES: dict[str, tuple[list[str], Callable[[torch.Tensor], torch.Tensor]]] = {
    "30 %": (["--sparsity", "0.3"], lambda score: reference.keep_per_row(score, 0.3)),
    "2:4": (["--pattern", "2:4"], lambda score: reference.keep_n_of_m(score, 2, 4)),
    "4:8": (["--pattern", "4:8"], lambda score: reference.keep_n_of_m(score, 4, 8)),
    "1:4": (["--pattern", "1:4"], lambda score: reference.keep_n_of_m(score, 1, 4)),
}


@pytest.mark.parametrize(
    ("kind", "choice"), [("llama-tied", "30 %"), ("llama-tied", "4:8"), ("gpt2", "2:4"), ("gpt2", "1:4")]
)
def test_the_authors_protocol_gives_the_reference_masks(
    kind: str, choice: str, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    folder = save_tiny(tmp_path / "model", kind)
    options, choose = CHOICES[choice]
    out = tmp_path / "out"
    outcome = command(
        "prune", folder, out, *options, "--calibration", tokens_file, "--calibrate-by", "block", "--batch-size", 3, "-q"
    )
    assert outcome.code == 0, outcome.stderr
    whole = load_plain(folder)
    reference.prune_whole_model(
        whole, _blocks(whole)[1], token_ids().split(3), reference.wanda_score, choose, by="block"
    )
    expected = whole.state_dict()
    for name, tensor in load_plain(out).state_dict().items():
        assert torch.equal(tensor == 0, expected[name] == 0), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_keep_their_bits(
    dtype: torch.dtype, tmp_path: Path, tokens_file: Path, command: RunCommand
) -> None:
    folder = save_tiny(tmp_path / "model", "llama-untied", dtype=dtype)
    out = tmp_path / "out"
    assert command("prune", folder, out, "--calibration", tokens_file, "-q").code == 0
    before, after = written_tensors(folder), written_tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept])
        assert not torch.signbit(tensor[~kept]).any()
        if "proj" in name:
            assert int((~kept).sum()) == tensor.numel() // 2


def test_the_batch_size_does_not_matter(llama: Path, tmp_path: Path, tokens_file: Path, command: RunCommand) -> None:
    masks = []
    for batch_size in (1, 4, 6):
        out = tmp_path / f"out-{batch_size}"
        run = command("prune", llama, out, "--calibration", tokens_file, "--batch-size", batch_size, "-q")
        assert run.code == 0
        masks.append({name: tensor == 0 for name, tensor in written_tensors(out).items()})
    for other in masks[1:]:
        assert all(torch.equal(mask, other[name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("kind", ["llama-untied", "gpt2"])
@torch.no_grad()
def test_two_streams_share_one_model(kind: str, tmp_path: Path) -> None:
    """Moved in turns, each gives what it gives alone; the blocks are whole again afterwards."""
    model = open_skeleton(save_kind(tmp_path / "model", kind))
    texts = [Batch(token_ids(seed)).split(3) for seed in (0, 1)]
    alone = []
    for batches in texts:
        with Stream(model, batches) as stream:
            for block in range(len(model.blocks)):
                stream.load(block)
                stream.run_block(block)
                stream.unload(block)
            alone.append([output.logits for output in stream.finish()])
    with Stream(model, texts[0]) as first, Stream(model, texts[1]) as second:
        for block in range(len(model.blocks)):
            first.load(block)
            second.run_block(block)
            first.run_block(block)
            first.unload(block)
        together = [[output.logits for output in stream.finish()] for stream in (first, second)]
    for one, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, one, other))
    assert not any("forward" in block.__dict__ for block in model.blocks)
