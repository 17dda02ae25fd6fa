"""Token files with padding: it counts in no statistic and in no loss, before or behind the tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.errors import CalibrationError
from tests import reference
from tests.calibration_texts import load
from tests.conftest import RunCommand, token_ids
from tests.tiny import load_plain, save_tiny

LENGTHS = (24, 9, 2, 17)
PAD = 999  # no token of the models, as of a tokenizer that was given a padding token of its own


def rows_of(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    return [row[None, :length] for row, length in zip(token_ids(samples=len(lengths)), lengths, strict=True)]


def padded_file(path: Path, rows: list[torch.Tensor], length: int, side: str) -> Path:
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        tokens = row.shape[1]
        at = slice(length - tokens, length) if side == "left" else slice(0, tokens)
        ids[number, at], mask[number, at] = row[0], 1
    save_file({"input_ids": ids, "attention_mask": mask}, path)
    return path


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value == 0 for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("kind", "by"),
    [
        ("gpt2", "block"),  # positions count from the first token
        ("mamba", "block"),  # a state that padding before the tokens would change
        ("llama4_text", "sublayer"),  # its experts get a row for every token and expert
    ],
)
@torch.no_grad()
def test_masks_are_those_of_rows_without_their_padding(kind: str, by: str, tmp_path: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", kind)
    file = padded_file(tmp_path / "padded.safetensors", rows_of(), 24, "left")
    run = command("prune", model, tmp_path / "out", "--calibration", file, "--calibrate-by", by, "-q")
    assert run.code == 0, run.stderr
    whole = load_plain(model)
    blocks = next(module for name, module in whole.named_modules() if name.rpartition(".")[2] in ("layers", "h"))
    choose = lambda score: reference.keep_per_row(score, 0.5)  # noqa: E731
    reference.prune_whole_model(whole, list(blocks.children()), rows_of(), reference.wanda_score, choose, by=by)
    expected = whole.state_dict()
    for name, tensor in load_plain(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor == 0, expected[name] == 0), name


def losses_of(folder: Path, rows: list[torch.Tensor]) -> list[float]:
    """Of every predicted token, from the plain model on each row by itself."""
    model, losses = load_plain(folder), []
    for row in rows:
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].double()
        losses += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").tolist()
    return losses


@torch.no_grad()
def test_perplexity_is_that_of_the_real_tokens(tmp_path: Path, command: RunCommand) -> None:
    model, dense = save_tiny(tmp_path / "model", "gpt2"), save_tiny(tmp_path / "dense", "gpt2", seed=1)
    file = padded_file(tmp_path / "padded.safetensors", rows_of(), 24, "left")
    found = command("eval", model, "--data", file, "--against", dense, "--batch-size", 2, "--json")
    assert found.code == 0, found.stderr
    mine, other = losses_of(model, rows_of()), losses_of(dense, rows_of())
    evaluation, text = found.json["evaluation"], found.json["text"]
    assert evaluation["loss"] == pytest.approx(math.fsum(mine) / len(mine), rel=1e-5)
    assert (evaluation["windows"], evaluation["predicted_tokens"]) == (4, len(mine)) == (4, sum(LENGTHS) - 4)
    increase = math.fsum(mine) / len(mine) - math.fsum(other) / len(other)
    assert found.json["comparison"]["loss_increase"] == pytest.approx(increase, abs=1e-5)
    assert (text["samples"], text["seq_len"], text["tokens"]) == (4, 24, sum(LENGTHS))
    assert "without its padding" in text["protocol"]


@torch.no_grad()
def test_the_error_of_the_loss_is_that_of_a_ratio(tmp_path: Path, command: RunCommand) -> None:
    model = save_tiny(tmp_path / "model", "gpt2")
    file = padded_file(tmp_path / "padded.safetensors", rows_of(), 24, "right")
    found = command("eval", model, "--data", file, "--json").json["evaluation"]
    sums = [math.fsum(losses_of(model, [row])) for row in rows_of()]
    tokens = [length - 1 for length in LENGTHS]
    ratio = sum(sums) / sum(tokens)
    spread = sum((total - ratio * count) ** 2 for total, count in zip(sums, tokens, strict=True))
    expected = math.sqrt(spread / 3 * 4) / sum(tokens)
    assert found["loss_standard_error"] == pytest.approx(expected, rel=1e-4)


OPTIONS: dict[str, tuple[str, ...]] = {
    "means and variances, by sample, outliers": ("-m", "dsnot", "-o", "released=true", "--allocate", "owl"),
    "Gram matrices beside the dense model, slopes tried, the head": (
        *("-m", "sparsegpt", "--target", "dense", "--allocate", "atp", "-o", "atp.candidates=2"),
        # Through more blocks a last bit can grow to another weight.
        *("--include", "*layers.0.*", "--include", "*lm_head*"),
    ),
    "blocks by influence, refitted": ("-m", "depth", "-o", "remove=1", "-o", "score=influence"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_padding_changes_nothing(options: tuple[str, ...], llama: Path, tmp_path: Path, command: RunCommand) -> None:
    """The same tokens with padding behind and before them, and without any."""
    rows = rows_of((22,) * 6)
    save_file({"input_ids": torch.cat(rows)}, tmp_path / "plain.safetensors")
    padded_file(tmp_path / "padded.safetensors", rows, 24, "left")
    reports: list[dict[str, Any]] = []
    for name in ("plain", "padded"):
        text = tmp_path / f"{name}.safetensors"
        run = command("prune", llama, tmp_path / name, *options, "--calibration", text, "--eval", text, "--json")
        assert run.code == 0, run.stderr
        reports.append(run.json)
    plain, padded = (zeros_of(tmp_path / name) for name in ("plain", "padded"))
    assert plain.keys() == padded.keys()
    assert all(torch.equal(mask, padded[name]) for name, mask in plain.items())
    errors = [[tensor["output_error"] or 0 for tensor in report["tensors"]] for report in reports]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3, abs=1e-6)
    after = [report["evaluation"]["after"]["loss"] for report in reports]
    assert after[1] == pytest.approx(after[0], rel=1e-5)
    assert reports[0]["output_error_rows"] == reports[1]["output_error_rows"]


def test_experts_are_counted_without_padding(tmp_path: Path, command: RunCommand) -> None:
    model, rows = save_tiny(tmp_path / "model", "mixtral"), rows_of((22,) * 6)
    save_file({"input_ids": torch.cat(rows)}, tmp_path / "plain.safetensors")
    padded_file(tmp_path / "padded.safetensors", rows, 24, "right")
    found = []
    for name in ("plain", "padded"):
        options = ("-m", "experts", "-o", "keep=3", "--calibration", tmp_path / f"{name}.safetensors", "--json")
        run = command("prune", model, tmp_path / name, *options)
        assert run.code == 0, run.stderr
        found.append([value for block in run.json["structure"]["blocks"] for value in block["scores"].values()])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_sweep_weighs_windows_by_their_tokens(llama: Path, tmp_path: Path, command: RunCommand) -> None:
    file = padded_file(tmp_path / "padded.safetensors", rows_of(), 24, "right")
    options = ("-m", "magnitude", "-s", "0.5", "--data", file, "--json")
    run = command("sweep", llama, tmp_path / "out", *options)
    assert run.code == 0, run.stderr
    pruned = run.json["points"][-1]
    increase = pruned["evaluation"]["loss"] - run.json["dense"]["loss"]
    assert pruned["loss_increase"] == pytest.approx(increase, abs=1e-9)


def test_a_mask_without_padding_changes_no_byte(tmp_path: Path) -> None:
    ids = token_ids()
    save_file({"input_ids": ids}, tmp_path / "plain.safetensors")
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "mask.safetensors")
    plain, masked = (load(tmp_path / f"{name}.safetensors") for name in ("plain", "mask"))
    assert (masked.mask, masked.sha256, masked.protocol) == (None, plain.sha256, plain.protocol)
    assert torch.equal(masked.ids, plain.ids)
    padded = load(padded_file(tmp_path / "padded.safetensors", rows_of(), 24, "right"))
    first, *_, last = padded.windows.split(1)
    assert first.mask is None, "a batch of whole rows goes as it would without a mask"
    assert last.mask is not None
    assert (padded.ids.max() < PAD, padded.available_tokens) == (True, sum(LENGTHS))
    assert padded.sha256 != plain.sha256


IDS = torch.ones(2, 4, dtype=torch.int64)
MASKS: dict[str, tuple[torch.Tensor, str]] = {
    "shape": (torch.ones(2, 3), r"is \[2, 3\], but input_ids is \[2, 4\]: save both of one shape"),
    "values": (2 * IDS, "holds other numbers than 0 and 1: save 1 for tokens and 0 for padding"),
    "halves": (IDS / 2, "holds other numbers than 0 and 1"),
    "not a number": (IDS * math.nan, "holds other numbers than 0 and 1"),
    "nothing": (torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "has 0 ones in row 1 .*: leave the row out"),
    "one token": (torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]]), "has 1 ones in row 0 .*: leave the row out"),
    "holes": (
        torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]]),
        "has zeros between the tokens of row 0 .*: save one text",
    ),
    "holes on the left": (torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]]), "has zeros between the tokens of row 0"),
}


@pytest.mark.parametrize(("mask", "message"), MASKS.values(), ids=MASKS.keys())
def test_masks_that_do_not_do(mask: torch.Tensor, message: str, tmp_path: Path) -> None:
    save_file({"input_ids": IDS, "attention_mask": mask}, tmp_path / "ids.safetensors")
    with pytest.raises(CalibrationError, match=rf"^attention_mask in .*ids\.safetensors {message}") as caught:
        load(tmp_path / "ids.safetensors")
    assert "\n" not in str(caught.value)
